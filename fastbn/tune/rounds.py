"""A search as workers share it, on any number of machines: rounds, slots, claims, retries.

A round is a study of Optuna. Whoever creates it puts all its trials into the storage at once, as
numbered slots that wait; a worker claims one by setting it from waiting to running, which a storage
grants once. So their number is exact, and what a random search draws depends on the number of the
slot alone. The trial of a dead worker is set to failed, and a copy of it waits in the same slot.
Should two workers fill a slot at the same time, the trial with the lower number counts and whoever
claims the other one drops it. The next round follows from finished trials only: every worker
computes the same one.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastbn.demo import DemoError, require
from fastbn.tune.space import Params, Scale

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

Objective: TypeAlias = Callable[[Params], Any]
Box: TypeAlias = Mapping[str, Scale]

SAMPLERS = ("random", "tpe", "cmaes")
POLL = 0.3  # seconds between two looks at the storage
BEAT = 10.0  # seconds between two signs of life of a running trial
GRACE = 60.0  # seconds without one after which its worker counts as dead
ATTEMPTS = 3  # so many workers may die of a trial
FEW = 5  # a fifth of the trials, at least 3, decide where the next round searches


@dataclass(frozen=True)
class Plan:
    """What all workers of a search must agree on."""

    objective: Objective
    space: dict[str, Scale]
    held: Params
    start: Params
    trials: int
    rounds: int
    sampler: str
    prune: bool
    seed: int
    study: str

    def sizes(self) -> list[int]:
        """Return how many trials each round has."""
        return [
            self.trials // self.rounds + (index < self.trials % self.rounds)
            for index in range(self.rounds)
        ]

    def about(self) -> dict[str, str]:
        """Return the plan as text, to be compared with that of a study."""
        function = self.objective
        name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
        known = name if hasattr(function, "__qualname__") else repr(function)
        # The module of a script is called otherwise where it is imported.
        others = ("space", "held", "start", "trials", "rounds", "sampler", "prune", "seed")
        return {
            "objective": known.removeprefix("__main__:").removeprefix("__mp_main__:"),
            **{name: repr(getattr(self, name)) for name in others},
        }


@dataclass(frozen=True)
class Record:
    """A trial of a search.

    Attributes
    ----------
    number : int
        From 0, over all rounds.
    round : int
        From 1.
    state : str
        "waiting", "running", "complete", "pruned" (stopped early) or "failed" (its workers died).
    params : dict
        The hyper-parameters, with those that were held; empty while waiting.
    value : float or None
        What the objective returned or last yielded; infinity for NaN.
    steps : list of float
        All that it yielded.
    seconds : float or None
        How long it took.
    worker : str
        Who ran it.
    attempts : int
        How often it was begun, 0 while waiting for the first time.
    """

    number: int
    round: int
    state: str
    params: Params = field(default_factory=dict)
    value: float | None = None
    steps: list[float] = field(default_factory=list)
    seconds: float | None = None
    worker: str = ""
    attempts: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("complete", "pruned", "failed")

    @property
    def sort_value(self) -> float:
        """The value, infinity where there is none."""
        return math.inf if self.value is None else self.value


def ranked(records: Sequence[Record]) -> list[Record]:
    """Return the complete trials with a finite value, the best first."""
    complete = [r for r in records if r.state == "complete" and math.isfinite(r.sort_value)]
    return sorted(complete, key=lambda r: (r.sort_value, r.number))


class Round:
    """A round, joined, or created where nobody has done so yet."""

    def __init__(
        self, plan: Plan, storage: BaseStorage, before: Round | None, earlier: Sequence[Record]
    ) -> None:
        self.plan, self.storage = plan, storage
        self.optuna = require("optuna", "tune")
        self.index: int = before.index + 1 if before else 0
        self.box: Box = plan.space
        count = max(3, len(earlier) // FEW)
        self.few = ranked(earlier)[:count]
        if before and self.few:
            self.box = {
                name: scale.zoom([r.params[name] for r in self.few], before.box[name])
                for name, scale in plan.space.items()
            }
        first = sum(plan.sizes()[: self.index])
        self.numbers = range(first, first + plan.sizes()[self.index])
        self._seen: dict[Any, tuple[Any, float, float]] = {}
        self._join()

    def _join(self) -> None:
        name = f"{self.plan.study} {self.index + 1}"
        created = True
        try:
            self.study: Any = self.optuna.create_study(storage=self.storage, study_name=name)
        except self.optuna.exceptions.DuplicatedStudyError:
            self.study = self.optuna.load_study(storage=self.storage, study_name=name)
            created = False
        about = self.plan.about()
        end = time.monotonic() + GRACE
        while not created and "plan" not in self.study.user_attrs and time.monotonic() < end:
            time.sleep(POLL)  # whoever created it is about to write it
        known = self.study.user_attrs.get("plan")
        if known is None:
            self.study.set_user_attr("plan", about)
        elif known != about:
            key = next(key for key in about if known.get(key) != about[key])
            raise DemoError(
                f"{key}: expected {known.get(key)} as in the study {self.plan.study!r},"
                f" got {about[key]}; another name makes another study"
            )
        if created:
            for record in self.few:
                self.study.add_trial(self._carried(record))
            for number in self.numbers:
                self._fill(number)

    def _carried(self, record: Record) -> FrozenTrial:
        """Return a finished trial of an earlier round, for the samplers and the pruner."""
        return self.optuna.create_trial(
            value=record.value,
            intermediate_values=dict(enumerate(record.steps, 1)),
            user_attrs={"carried": record.number},
            system_attrs={
                # As SuccessiveHalvingPruner notes it, so that new trials compete with this one.
                f"completed_rung_{rung}": record.steps[step - 1]
                for rung, step in enumerate(rungs(len(record.steps)))
            },
            **self._encoded(record.params),
        )

    def _encoded(self, params: Params) -> dict[str, Any]:
        return {
            "params": {s.key(n): s.encode(params[n]) for n, s in self.box.items()},
            "distributions": {s.key(n): s.distribution() for n, s in self.box.items()},
        }

    def _fill(self, number: int, failed: FrozenTrial | None = None) -> None:
        """Let a trial wait in a slot: a new one, or a copy of one that failed."""
        content: dict[str, Any] = {}
        if failed:
            content = {"params": failed.params, "distributions": failed.distributions}
        elif number == 0 and self.plan.start:
            content = self._encoded(self.plan.start)
        waiting = self.optuna.trial.TrialState.WAITING
        self.study.add_trial(
            self.optuna.create_trial(state=waiting, user_attrs={"slot": number}, **content)
        )

    def _trials(self) -> tuple[dict[int, FrozenTrial], dict[int, list[FrozenTrial]]]:
        """Return the trial that counts in each slot, and the failed ones."""
        counting: dict[int, FrozenTrial] = {}
        failed: dict[int, list[FrozenTrial]] = {number: [] for number in self.numbers}
        for trial in self.study.get_trials(deepcopy=False):
            number = trial.user_attrs.get("slot")
            if number in failed:
                if trial.state == self.optuna.trial.TrialState.FAIL:
                    failed[number].append(trial)
                else:
                    counting.setdefault(number, trial)
        return counting, failed

    def records(self) -> list[Record]:
        """Return the trials as they are now."""
        counting, failed = self._trials()
        return [self._record(n, counting.get(n), failed[n]) for n in self.numbers]

    def _record(self, number: int, trial: FrozenTrial | None, failed: list[FrozenTrial]) -> Record:
        attempts = sum("worker" in t.user_attrs for t in [*failed, *([trial] if trial else [])])
        if trial is None:
            given_up = _lost(failed) >= ATTEMPTS
            state, trial = ("failed", failed[-1]) if given_up else ("waiting", None)
        else:
            state = trial.state.name.lower()
        if trial is None or state == "waiting":
            return Record(number, self.index + 1, state, attempts=attempts)
        params = {n: s.decode(trial.params[s.key(n)]) for n, s in self.box.items()
                  if s.key(n) in trial.params}  # fmt: skip
        return Record(
            number,
            self.index + 1,
            state,
            params={**self.plan.held, **params},
            value=trial.value if trial.state.is_finished() and state != "failed" else None,
            steps=[trial.intermediate_values[step] for step in sorted(trial.intermediate_values)],
            seconds=trial.duration.total_seconds() if trial.duration else None,
            worker=trial.user_attrs.get("worker", ""),
            attempts=attempts,
        )

    def claim(self, worker: str) -> Trial | None:
        """Take a trial that waits, if there is one."""
        states = self.optuna.trial.TrialState
        for waiting in self.study.get_trials(deepcopy=False, states=(states.WAITING,)):
            try:
                if not self.storage.set_trial_state_values(waiting._trial_id, states.RUNNING):
                    continue  # another worker was faster
                self.storage.set_trial_user_attr(waiting._trial_id, "worker", worker)
                number = waiting.user_attrs["slot"]
                if self._trials()[0][number].number < waiting.number:
                    self.storage.set_trial_state_values(waiting._trial_id, states.FAIL)
                    continue  # the slot was filled twice
            except self.optuna.exceptions.UpdateFinishedTrialError:
                continue
            self.study.sampler = self._sampler(number)
            return self.optuna.trial.Trial(self.study, waiting._trial_id)
        return None

    def _sampler(self, number: int) -> BaseSampler:
        """Return a sampler with random numbers of the slot's own."""
        seed = int(np.random.SeedSequence([self.plan.seed, number]).generate_state(1)[0])
        samplers = self.optuna.samplers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            match self.plan.sampler:
                case "tpe":
                    # Trials that still run count as bad, so that workers do not crowd.
                    return samplers.TPESampler(seed=seed, constant_liar=True)
                case "cmaes":
                    independent = samplers.RandomSampler(seed)
                    return samplers.CmaEsSampler(
                        seed=seed,
                        independent_sampler=independent,
                        warn_independent_sampling=False,
                    )
                case _:
                    return samplers.RandomSampler(seed)

    def run(self, trial: Trial, tick: Callable[[], object]) -> None:
        """Run the objective of a claimed trial; a tick follows each value that it yields.

        If it raises, or the worker is told to end, another worker may have the trial.
        """
        states = self.optuna.trial.TrialState
        try:
            with self._alive(trial):
                params = {n: scale.suggest(trial, n) for n, scale in self.box.items()}
                value = self._follow(trial, {**self.plan.held, **params}, tick)
            if value is None:
                self.study.tell(trial, state=states.PRUNED, skip_if_finished=True)
            else:
                self.study.tell(trial, value, skip_if_finished=True)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            pass  # this worker counted as dead: the trial is another's
        except BaseException:
            self.release(self.storage.get_trial(trial._trial_id))
            raise

    def _follow(self, trial: Trial, params: Params, tick: Callable[[], object]) -> float | None:
        """Return the objective's value, None if it was stopped because it is hopeless."""
        steps = self.plan.objective(params)
        if not isinstance(steps, GeneratorType):
            return _number(steps)
        value: float | None = None
        try:
            for step, yielded in enumerate(steps, 1):
                value = _number(yielded)
                trial.report(value, step)
                tick()
                if self.plan.prune and self._hopeless(trial, step):
                    return None
        finally:
            steps.close()
        if value is None:
            raise ValueError("objective: expected at least one yield, got none")
        return value

    def _hopeless(self, trial: Trial, step: int) -> bool:
        """Halve successively: the worse half ends after a quarter of the steps and after half."""
        complete = (self.optuna.trial.TrialState.COMPLETE,)
        lengths = [t.last_step or 0 for t in self.study.get_trials(deepcopy=False, states=complete)]
        at = rungs(max(lengths, default=0))
        if step not in at:
            return False
        self.study.pruner = self.optuna.pruners.SuccessiveHalvingPruner(
            min_resource=at[0], reduction_factor=2
        )
        return bool(trial.should_prune())

    @contextmanager
    def _alive(self, trial: Trial) -> Iterator[None]:
        """Give signs of life while a trial runs."""
        done = threading.Event()

        def beat() -> None:
            for second in range(1, 10**9):
                if done.wait(1):
                    return
                if orphaned():
                    os.kill(os.getpid(), signal.SIGTERM)
                if second % BEAT == 0:
                    with suppress(Exception):  # the storage may be busy; the next one will do
                        self.storage.set_trial_user_attr(trial._trial_id, "beat", second)

        thread = threading.Thread(target=beat, name="fastbn.tune")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()  # it may hold a lock on the storage

    def release(self, trial: FrozenTrial, *, lost: bool = False) -> None:
        """Let another worker have a running trial; lost: its worker died."""
        try:
            if lost:
                self.storage.set_trial_user_attr(trial._trial_id, "lost", True)
            failed = self.optuna.trial.TrialState.FAIL
            self.storage.set_trial_state_values(trial._trial_id, failed)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return  # finished, or released by another
        self._refill(trial.user_attrs["slot"])

    def release_all(self, worker: str, *, lost: bool = False) -> bool:
        """Release what a worker runs, and return whether it ever claimed a trial."""
        running = self.optuna.trial.TrialState.RUNNING
        trials = self.study.get_trials(deepcopy=False)
        claimed = [trial for trial in trials if trial.user_attrs.get("worker") == worker]
        for trial in claimed:
            if trial.state == running:
                self.release(trial, lost=lost)
        return bool(claimed)

    def _refill(self, number: int) -> None:
        counting, failed = self._trials()
        if number not in counting and _lost(failed[number]) < ATTEMPTS:
            begun = [trial for trial in failed[number] if trial.params]
            self._fill(number, begun[-1] if begun else None)

    def _running(self) -> list[FrozenTrial]:
        running = (self.optuna.trial.TrialState.RUNNING,)
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=running)
            if "slot" in trial.user_attrs
        ]

    def tend(self) -> None:
        """Release the trials of dead workers, and fill slots that somebody died on filling."""
        for trial in self._running():
            # Beats are compared with each other, never clocks of two machines.
            if self._unchanged(trial.number, trial.user_attrs.get("beat")):
                self.release(trial, lost=True)
        counting, _ = self._trials()
        for number in self.numbers:
            if self._unchanged(("slot", number), number in counting) and number not in counting:
                self._refill(number)

    def _unchanged(self, key: Any, value: Any) -> bool:
        """Return whether a value has been the same for the time of grace.

        The time between two looks counts as a second at most: this process may have slept as long
        as the one it watches.
        """
        now = time.monotonic()
        last, at, waited = self._seen.get(key, (value, now, 0.0))
        waited = waited + min(now - at, 1.0) if last == value else 0.0
        self._seen[key] = value, now, waited
        return waited >= GRACE


class Search:
    """The rounds of a search, as far as they have come."""

    def __init__(self, plan: Plan, storage: BaseStorage) -> None:
        self.plan, self.storage = plan, storage
        self.rounds: list[Round] = []

    def current(self) -> Round | None:
        """Return the first round that is not over, None at the end of the search."""
        while True:
            last = self.rounds[-1] if self.rounds else None
            if last and not all(record.finished for record in last.records()):
                return last
            if len(self.rounds) == self.plan.rounds:
                return None
            self.rounds.append(Round(self.plan, self.storage, last, self.records()))

    def records(self) -> list[Record]:
        """Return the trials of all rounds as they are now."""
        return [record for each in self.rounds for record in each.records()]

    def work(self, worker: str, tick: Callable[[], object] = lambda: None) -> None:
        """Run trials until there is nothing left to do."""
        while (current := self.current()) and not orphaned():
            tick()
            current.tend()
            trial = current.claim(worker)
            if trial:
                current.run(trial, tick)
            else:
                time.sleep(POLL)
        tick()


def rungs(length: int) -> tuple[int, ...]:
    """Return after which steps runs of a length are compared."""
    first = length // 4
    return (first, 2 * first) if first else ()


def orphaned() -> bool:
    """Return whether the process that started this worker is gone."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _lost(failed: Sequence[FrozenTrial]) -> int:
    return Counter("lost" in trial.user_attrs for trial in failed)[True]


def _number(value: Any) -> float:
    """Return what an objective gave as a float; NaN is as bad as infinity."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"objective: expected a number, got {value!r}") from None
    return math.inf if math.isnan(number) else number
