"""`search`: hyper-parameters for a function, by workers in parallel."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import traceback
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import fastbn
from fastbn.demo import DemoError, require
from fastbn.demo.files import one_line
from fastbn.tune.importances import importances
from fastbn.tune.rounds import ATTEMPTS, SAMPLERS, Objective, Plan, Record, Search, ranked
from fastbn.tune.show import show
from fastbn.tune.space import Params, Scale, Space, Value, tiers_of
from fastbn.tune.storage import POLL, absolute, opened, raised_by_objective

# A tier is tuned if there are this many trials for each hyper-parameter up to and with it.
TRIALS_EACH = 6
THREADS = ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS_TO_END = 10  # for a worker that is told to end
TERMINATED = 128 + signal.SIGTERM  # its exit status then, as a shell has it; text would be printed


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
        How much of the order of the trials each tuned hyper-parameter explains by itself, over the
        whole space. Boosted trees learn the ranks of the values from the positions on the scales.
        The share is the variance of their mean over the other hyper-parameters; the shares add up
        to 1. Ranks, because a few trials that diverged would explain all of the values' variance.
        Trials that were stopped count with their last value. The dict is empty where importances
        cannot be told: from fewer than 10 trials, or where the trees foretell the rank of a trial
        that they have not seen no better than the mean does.

    References
    ----------
    Friedman, Greedy function approximation: a gradient boosting machine, Annals of Statistics 29,
    2001. Sobol, Sensitivity estimates for nonlinear mathematical models, MMCE 1, 1993.
    """

    best: Params
    value: float
    trials: list[Record]
    tiers: list[dict[str, Scale]]
    boxes: list[Mapping[str, Scale]]

    @cached_property
    def importances(self) -> dict[str, float]:  # noqa: D102
        return importances(self.trials, self.boxes)


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
    An exception in the objective ends the search; its trial waits again. A note on it tells the
    hyper-parameters. A trial whose worker dies, or ends by ``sys.exit``, is given to another one.
    After the third it is given up, and the search goes on. If three are given up and none has ended
    well, it ends with what has ended the workers.

    What it waits for, and what is left out of a journal that was cut off, goes to the logger
    "fastbn.tune".

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
    for name, text in (("study", study), ("storage", "journal" if storage is None else storage)):
        if not isinstance(text, str) or not text:
            raise DemoError(f"{name}: expected a name, got {text!r}")
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
    here = f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}"  # different at every start
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if storage is not None:
            storage = absolute(storage)
        elif workers > 1:
            storage = str(Path(stack.enter_context(tempfile.TemporaryDirectory()), "journal"))
        process = Search(plan, stack.enter_context(opened(storage)))
        tell = stack.enter_context(show(trials)) if progress else None

        def tick() -> None:
            process.tell_waiting(here)
            if tell:
                tell(process.records())

        if workers == 1:
            with _released(process, [f"{here}-0"]):
                process.work(f"{here}-0", tick)
        else:
            _supervise(process, storage, workers, here, tick)
        records = process.records()
    best = next(iter(ranked(records)), None)
    if not best:
        raise _no_value(records)
    boxes = [each.box for each in process.rounds]
    return Result(best.params, best.sort_value, records, tiers, boxes)


def _no_value(records: Sequence[Record]) -> DemoError:
    """Return why a search has no result."""
    failed = [record for record in records if record.state == "failed"]
    if not failed:
        expected = "objective: expected a finite number, got none"
        return DemoError(f"{expected} in {len(records)} trials")
    reasons = ", ".join(dict.fromkeys(record.reason for record in failed))
    given_up = f"objective: trials given up: {len(failed)}"
    ended = f"each after {ATTEMPTS} of its workers were ended, at last by {reasons}"
    return DemoError(f"{given_up}, {ended}; no other gave a finite number")


@contextmanager
def _released(search: Search, workers: Collection[str]) -> Iterator[None]:
    """Let the trials of workers wait again, if they are interrupted."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # of the storage: what has happened first is told
            for worker in workers:
                search.release(worker)
        raise


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


def told(error: BaseException, who: str = "worker") -> DemoError:
    """Return an exception of the user's code in one line, with its traceback as a note."""
    if raised_by_objective(error):
        who = "objective"
    tb = error.__traceback__
    while tb and who != "worker" and _leads_there(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    whole = traceback.TracebackException(type(error), error, tb)  # whatever its __str__ does
    text = " ".join(str(whole).split())
    if not text.startswith("objective: "):
        text = ": ".join(filter(None, (who, type(error).__name__, text)))
    result = DemoError(text)
    if tb or isinstance(error, SyntaxError):  # which tells its line by itself
        result.add_note("".join(whole.format()))
    return result


def _leads_there(file: str) -> bool:
    return Path(file).parent == Path(__file__).parent or "importlib" in file


def _work(plan: Plan, url: str | None, name: str, messages: Connection) -> None:
    """Be a worker; send what ended it, and whether that ends the search."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C, and ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # the objective ends in order
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        with _quiet(), opened(url) as storage:
            search = Search(plan, storage)
            try:
                search.work(name)
            except BaseException:
                if not _parent().is_alive():
                    search.release(name)
                raise
    except BaseException as error:
        ours = isinstance(error, DemoError) and not raised_by_objective(error)
        why = error if ours else told(error)
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            why = DemoError("worker: SIGTERM")
        trace = "".join(getattr(why, "__notes__", ()))
        with suppress(OSError):  # the parent is dead
            messages.send((isinstance(error, Exception), str(why), trace))


def _parent() -> BaseProcess:
    process = multiprocessing.parent_process()
    assert process  # this is a worker
    return process


def _end_with_the_parent() -> None:
    _parent().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _supervise(
    search: Search, url: str | None, workers: int, here: str, tick: Callable[[], object]
) -> None:
    """Start workers, replace those that die, until the search is over."""
    try:
        pickle.dumps(search.plan)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        expected = f"expected a function of a module, for {workers} workers"
        raise DemoError(f"objective: {expected}: {one_line(error)}") from error
    context = multiprocessing.get_context("spawn")
    names: list[str] = []
    alive: dict[Connection, SpawnProcess] = {}
    idle_deaths = 0
    search.current()
    given_up = search.count("failed")
    with _released(search, names), _ended(alive):
        while current := search.current():
            while len(alive) < workers:
                names.append(f"{here}-{len(names)}")
                messages, sender = context.Pipe(duplex=False)
                arguments = (search.plan, url, names[-1], sender)
                process = context.Process(target=_work, args=arguments, name=names[-1])
                with _divided(workers), sender:
                    process.start()
                alive[messages] = process
            tick()
            ready = wait(list(alive), timeout=POLL)
            current.tend()
            # A child of a dead worker may hold its pipe open, so that the pipe is never ready.
            for messages in [m for m in alive if m in ready or not alive[m].is_alive()]:
                final, text, trace = False, "", ""
                with suppress(EOFError, OSError):
                    if messages.poll():  # a worker that was killed or is done sends nothing
                        final, text, trace = messages.recv()
                if final:
                    failure = DemoError(text)
                    failure.add_note(trace)
                    raise failure
                process = alive.pop(messages)
                messages.close()
                _end(process)
                reason = text.partition(": ")[2] or _reason(process.exitcode)
                if search.release(process.name, reason) or reason == _reason(0):
                    idle_deaths = 0
                else:
                    idle_deaths += 1
                if idle_deaths == ATTEMPTS:
                    ended = f"{ATTEMPTS} ended before their first trial, the last with {reason}"
                    guard = 'started from a file, under `if __name__ == "__main__":`?'
                    raise DemoError(f"workers: {ended}; is the search {guard}")
                lost = search.count("failed") - given_up
                if lost >= ATTEMPTS and not search.count("complete", "pruned"):
                    raise _no_value(search.records())
        tick()


def _reason(code: int | None) -> str:
    """Return what ended a process, by its exit code."""
    with suppress(ValueError):
        return signal.Signals(-(code or 0)).name
    return f"signal {-code}" if code and code < 0 else f"exit code {code}"


def _end(process: SpawnProcess) -> None:
    """Let a process end, but not for ever: it may have threads."""
    process.join(SECONDS_TO_END)
    process.kill()
    process.join()


@contextmanager
def _ended(processes: Mapping[Connection, SpawnProcess]) -> Iterator[None]:
    """End processes in the end, at once after an error."""
    try:
        yield
    except BaseException:
        for process in processes.values():
            process.terminate()
        raise
    finally:
        for messages, process in processes.items():
            _end(process)
            messages.close()


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
