"""`search`: hyper-parameters for a function, by workers in parallel."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

import fastbn
from fastbn.demo import DemoError, require
from fastbn.demo.files import one_line
from fastbn.tune.rounds import ATTEMPTS, POLL, SAMPLERS, Objective, Plan, Record, Search, ranked
from fastbn.tune.show import show
from fastbn.tune.space import Params, Scale, Space, Value, tiers_of

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

# A tier is tuned if there are this many trials for each hyper-parameter up to and with it.
TRIALS_EACH = 6
THREADS = ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS_TO_END = 10  # for a worker that is told to end


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes
    ----------
    best : dict
        The hyper-parameters of the best complete trial, those held included.
    value : float
        Its value.
    trials : list of Record
        All trials, by number.
    tiers : list of dict
        The space, tier by tier.
    boxes : list of dict
        The part of the space that each round searched; without what was held.
    importances : dict
        How much of the order of the trials each tuned hyper-parameter explains. This is a
        functional analysis of variance over the ranks of the values: over the values themselves, a
        few trials that diverged would explain everything. Trials that were stopped count with their
        last value. The shares add up to 1. The dict is empty where all values are the same.

    References
    ----------
    Hutter, Hoos, Leyton-Brown, An efficient approach for assessing hyperparameter importance,
    ICML 2014.
    """

    best: Params
    value: float
    trials: list[Record]
    tiers: list[dict[str, Scale]]
    boxes: list[Mapping[str, Scale]]

    @cached_property
    def importances(self) -> dict[str, float]:  # noqa: D102
        optuna = require("optuna", "tune")
        scales = self.boxes[0]
        seen = [record for record in self.trials if record.value is not None]
        order = sorted({record.sort_value for record in seen})
        if len(order) < 2:
            return {}
        with _quiet():
            warnings.simplefilter("ignore")  # it warns of trees with few trials
            study = optuna.create_study()
            kinds = {name: scale.distribution() for name, scale in scales.items()}
            for record in seen:
                rank = float(order.index(record.sort_value))
                params = {name: scale.encode(record.params[name]) for name, scale in scales.items()}
                study.add_trial(optuna.create_trial(value=rank, params=params, distributions=kinds))
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {name: float(found.get(name, 0.0)) for name in scales}


def search(
    objective: Objective,
    space: Space,
    *,
    trials: int = 40,
    rounds: int | None = None,
    sampler: str = "random",
    prune: bool = True,
    start: Mapping[str, Value] | None = None,
    workers: int = 1,
    storage: str | None = None,
    study: str = "study",
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Look for the hyper-parameters that make a function small: random, then coarse to fine.

    The trials of the first round are spread over the whole space, those of each later round over
    the box around the best few so far (a fifth, at least three), on the same scales.

    Parameters
    ----------
    objective : callable
        ``objective(params)`` gets a dict of hyper-parameters and returns a number, the smaller the
        better. As a generator it yields one after each epoch, and the last one counts: then
        hopeless trials are stopped early. With several workers it is a function of a module.
    space : dict of scales, or list of such dicts
        The scale of each hyper-parameter by its name. Several dicts are tiers, the most important
        first: a tier is tuned if there are at least 6 trials for each hyper-parameter in it and in
        the tiers before it, else held as in start. The first one always is.
    trials : int
        How many trials all workers on all machines make together.
    rounds : int
        From 1 (no zoom) to trials; by default 2, and 1 for the samplers that zoom of themselves.
    sampler : str
        "random", or Optuna's "tpe" or "cmaes".
    prune : bool
        Whether hopeless trials are stopped: by successive halving after a quarter and half of the
        steps. Which ones depends on the order in which the workers get there.
    start : dict, optional
        The configuration that is tried first, and held where it is not tuned; by default the
        middle of each scale is held, and all trials are drawn.
    workers : int
        How many processes. 1 runs in this one; more divide `fastbn.get_num_threads` among them.
        Where processes are spawned, call this under ``if __name__ == "__main__":``.
    storage : str, optional
        Where the study is kept, to be resumed, and joined by other machines: the name of a file
        (Optuna's journal), "sqlite:///FILE", "postgresql://..." or "grpc://HOST:PORT".
    study : str
        Its name there.
    seed : int
        What is drawn depends on it (and, but for the random sampler, on the trials before).
    progress : bool
        Whether the trials are shown: a live table on a terminal, else a line each.

    Returns
    -------
    Result

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above, an extra is missing, the storage cannot be used or has a
        study of that name with another plan, or no trial gave a finite number.
    KeyboardInterrupt
        After Ctrl-C. The running trials wait again: the same call resumes the study.

    Notes
    -----
    An exception in the objective ends the search; its trial waits again. A trial whose worker dies
    is given to another one, three times at most.

    References
    ----------
    Bergstra and Bengio, Random search for hyper-parameter optimization, JMLR 13, 2012.
    Li et al., A system for massively parallel hyperparameter tuning, MLSys 2020.

    Examples
    --------
    >>> from fastbn.tune import log_uniform, search
    >>> def objective(params):
    ...     return abs(params["lr"] - 0.01)
    >>> result = search(objective, {"lr": log_uniform(1e-4, 1)}, progress=False)
    >>> 0.005 < result.best["lr"] < 0.02
    True
    """
    tiers = tiers_of(space)
    scales = {name: scale for tier in tiers for name, scale in tier.items()}
    for name, count, least in (("trials", trials, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if type(count) is not int or count < least:
            raise DemoError(f"{name}: expected an integer from {least}, got {count!r}")
    if sampler not in SAMPLERS:
        raise DemoError(f"sampler: expected {' or '.join(SAMPLERS)}, got {sampler!r}")
    if rounds is None:
        rounds = min(2, trials) if sampler == "random" else 1
    if type(rounds) is not int or not 1 <= rounds <= trials:
        raise DemoError(f"rounds: expected an integer from 1 to {trials} trials, got {rounds!r}")
    if not callable(objective):
        raise TypeError(f"objective: expected a function, got {objective!r}")
    if start is not None and start.keys() != scales.keys():
        got = ", ".join(start) or "nothing"
        raise DemoError(f"start: expected {', '.join(scales)}, got {got}")
    start = dict(start or {})
    for name, value in start.items():
        if value not in scales[name]:
            raise DemoError(f"start: {name}: expected a value of {scales[name]}, got {value!r}")
    tuned = tuned_of(tiers, trials)
    held = {n: start[n] if start else s.at(0.5) for n, s in scales.items() if n not in tuned}
    plan = Plan(objective, tuned, held, start, trials, rounds, sampler, prune, seed, study)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if storage is None and workers > 1:
            storage = str(Path(stack.enter_context(tempfile.TemporaryDirectory()), "journal"))
        process = Search(plan, stack.enter_context(opened(storage)))
        tell = stack.enter_context(show(trials)) if progress else None

        def tick() -> None:
            if tell:
                tell(process.records())

        if workers == 1:
            process.work(f"{_here()}-0", tick)
        else:
            _supervise(process, storage, workers, tick)
        records = process.records()
    best = next(iter(ranked(records)), None)
    if not best:
        raise DemoError(f"objective: expected a finite number, got none in {trials} trials")
    boxes = [each.box for each in process.rounds]
    return Result(best.params, best.sort_value, records, tiers, boxes)


def tuned_of(tiers: list[dict[str, Scale]], trials: int) -> dict[str, Scale]:
    """Return the hyper-parameters that so many trials are enough for, tier by tier."""
    tuned = dict(tiers[0])
    for tier in tiers[1:]:
        if trials < TRIALS_EACH * (len(tuned) + len(tier)):
            break
        tuned |= tier
    return tuned


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from reporting what is shown anyway, and that parts of it are experimental."""
    optuna = require("optuna", "tune")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def opened(url: str | None) -> Iterator[BaseStorage]:
    """Open a storage, and close it in the end."""
    with ExitStack() as stack:
        try:
            storage = _open(url, stack)
        except DemoError:
            raise
        except Exception as error:  # each kind of storage has its own errors
            why = (str(error).splitlines() or [type(error).__name__])[0]  # the SQL stands below
            raise DemoError(f"storage: {url}: cannot be used: {why}") from error
        yield storage


def _open(url: str | None, stack: ExitStack) -> BaseStorage:
    storages = require("optuna", "tune").storages
    if url is None:
        return storages.InMemoryStorage()
    scheme, separator, rest = url.partition("://")
    if not separator:
        Path(url).resolve().parent.mkdir(parents=True, exist_ok=True)
        # Symbolic links, Optuna's own choice, need a privilege on Windows.
        lock = storages.journal.JournalFileOpenLock(url)
        return storages.JournalStorage(storages.journal.JournalFileBackend(url, lock))
    if scheme == "grpc":
        require("grpc", "servers")
        host, _, port = rest.rpartition(":")
        if not host or not port.isdecimal():
            raise DemoError(f"storage: expected grpc://HOST:PORT, got {url}")
        proxy = storages.GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=10)
        stack.callback(proxy.close)
        return proxy
    if scheme == "postgresql":
        require("psycopg", "servers")
        url = f"postgresql+psycopg://{rest}"  # SQLAlchemy's default driver has changed once
    options = {"connect_args": {"timeout": 60}} if scheme.startswith("sqlite") else {}
    for attempt in itertools.count(1):
        try:
            database = storages.RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            # Two that open a new database at once disagree on who creates the tables.
            if attempt == 5 or isinstance(error, ImportError):
                raise
            time.sleep(POLL)
    stack.callback(database.engine.dispose)
    return storages.get_storage(database)


def _here() -> str:
    """Return a name for this process, different on every machine and at every start."""
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}"


def _work(plan: Plan, url: str | None, name: str, failure: Connection) -> None:
    """Be a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C, and ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it ends its trial in order
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        with _quiet(), opened(url) as storage:
            Search(plan, storage).work(name)
    except DemoError as error:
        failure.send((str(error), ""))
    except Exception as error:
        text = f"objective: {type(error).__name__}: {one_line(error)}"
        failure.send((text, traceback.format_exc()))


def _end_with_the_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _supervise(search: Search, url: str | None, workers: int, tick: Callable[[], object]) -> None:
    """Start workers, replace those that die, until the search is over."""
    try:
        pickle.dumps(search.plan)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        expected = f"expected a function of a module, for {workers} workers"
        raise DemoError(f"objective: {expected}: {one_line(error)}") from error
    context = multiprocessing.get_context("spawn")
    here, started, idle_deaths = _here(), itertools.count(), 0
    alive: dict[Connection, SpawnProcess] = {}
    try:
        while current := search.current():
            while len(alive) < workers:
                name = f"{here}-{next(started)}"
                failure, sender = context.Pipe(duplex=False)
                plan = (search.plan, url, name, sender)
                process = context.Process(target=_work, args=plan, name=name)
                with _divided(workers), sender:
                    process.start()
                alive[failure] = process
            tick()
            ready = wait(list(alive), timeout=POLL)
            current.tend()
            # A child of a dead worker may hold its pipe open, so that the pipe is never ready.
            for failure in [f for f in alive if f in ready or not alive[f].is_alive()]:
                process = alive.pop(failure)
                with failure, suppress(EOFError, OSError):
                    if failure.poll():  # a worker that was killed or is done sends nothing
                        text, trace = failure.recv()
                        told = DemoError(text)
                        told.add_note(trace)
                        raise told
                process.join()
                worked = [each.release(process.name, "lost") for each in search.rounds]
                idle_deaths = 0 if any(worked) or process.exitcode == 0 else idle_deaths + 1
                if idle_deaths == ATTEMPTS:
                    ended = f"{ATTEMPTS} ended before their first trial, the last with exit code"
                    guard = 'started from a file, under `if __name__ == "__main__":`?'
                    raise DemoError(f"workers: {ended} {process.exitcode}; is the search {guard}")
        tick()
    except BaseException:
        for process in alive.values():
            process.terminate()
        for process in alive.values():
            process.join(SECONDS_TO_END)
            process.kill()
            for each in search.rounds:
                each.release(process.name)
        raise
    finally:
        for failure, process in alive.items():
            process.join()
            failure.close()


@contextmanager
def _divided(workers: int) -> Iterator[None]:
    """Let processes started meanwhile share the threads of this one.

    NumPy's libraries and fastbn read these when they are loaded.
    """
    before = {name: os.environ[name] for name in THREADS if name in os.environ}
    share = str(max(1, fastbn.get_num_threads() // workers))
    os.environ.update(dict.fromkeys(THREADS, share))
    try:
        yield
    finally:
        for name in THREADS:
            del os.environ[name]
        os.environ.update(before)
