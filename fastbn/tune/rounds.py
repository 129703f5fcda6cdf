"""A search as workers on any number of machines share it: rounds, slots, claims, retries.

A round is a study of Optuna with a number of slots, one for each trial. A worker takes an open slot
by adding a running trial for it to the storage. Of several trials for one slot the one with the
lowest number counts, and a worker that added another one drops it. So the number of trials is
exact. What a random search draws depends on the number of the slot alone. The trial of a dead
worker is set to failed, which opens its slot again. The next round follows from finished trials
only, so every worker computes the same one.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastbn.demo import DemoError, require
from fastbn.tune.space import Params, Scale
from fastbn.tune.storage import BLAME, POLL, SLOW, log, told_if_slow

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

Objective: TypeAlias = Callable[[Params], Any]
Box: TypeAlias = Mapping[str, Scale]

SAMPLERS = ("random", "tpe", "cmaes")
BEAT = 10.0  # seconds between two signs of life of a running trial
GRACE = 60.0  # seconds without one after which its worker counts as dead
ATTEMPTS = 3  # a trial is given up after so many of its workers have died
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

    def numbers(self, index: int) -> range:
        """Return the numbers of the trials of a round."""
        size, more = divmod(self.trials, self.rounds)
        return range(index * size + min(index, more), (index + 1) * size + min(index + 1, more))

    def about(self) -> dict[str, str]:
        """Return the plan as text, to be compared with that of a study."""
        function = self.objective
        known = repr(function)
        if hasattr(function, "__qualname__"):
            known = f"{function.__module__}:{function.__qualname__}"
        # The module of a script has another name where a worker imports it.
        known = known.removeprefix("__main__:").removeprefix("__mp_main__:")
        others = {name: repr(value) for name, value in vars(self).items() if name != "study"}
        return {**others, "objective": known}


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
    reason : str
        What ended the last of its workers, if it failed.
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
    reason: str = ""

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
        self.states = self.optuna.trial.TrialState
        self.index: int = before.index + 1 if before else 0
        self.numbers = plan.numbers(self.index)
        self.box: Box = plan.space
        few = ranked(earlier)[: max(3, len(earlier) // FEW)]
        if before and few:
            self.box = {
                name: scale.zoom([r.params[name] for r in few], before.box[name])
                for name, scale in plan.space.items()
            }
        self._beats: dict[int, tuple[Any, float, float]] = {}
        self._join(few)

    def _join(self, few: Sequence[Record]) -> None:
        name = f"{self.plan.study} {self.index + 1}"
        try:
            self.study: Any = self.optuna.create_study(storage=self.storage, study_name=name)
            for record in few:
                self.study.add_trial(self._carried(record))
        except self.optuna.exceptions.DuplicatedStudyError:
            self.study = self.optuna.load_study(storage=self.storage, study_name=name)
            end = time.monotonic() + GRACE
            with told_if_slow(f"the plan of {name!r}: at most {GRACE:.0f} s for who has begun it"):
                while "plan" not in self.study.user_attrs and time.monotonic() < end:
                    time.sleep(POLL)
        about = self.plan.about()
        if "plan" not in self.study.user_attrs:
            self.study.set_user_attr("plan", about)
        known = self.study.user_attrs["plan"]
        for key, value in about.items():
            if known.get(key) != value:
                expected = f"{key}: expected {known.get(key)} as in the study {self.plan.study!r}"
                raise DemoError(f"{expected}, got {value}; another name makes another study")

    def _carried(self, record: Record) -> FrozenTrial:
        """Return a finished trial of an earlier round, for the samplers and the pruner."""
        steps = dict(enumerate(record.steps, 1))
        # As SuccessiveHalvingPruner notes it, so that new trials compete with this one.
        notes = {f"completed_rung_{k}": steps[step] for k, step in enumerate(rungs(len(steps)))}
        return self.optuna.create_trial(
            value=record.value, intermediate_values=steps, user_attrs={"carried": record.number},
            system_attrs=notes, **self._encoded(record.params),
        )  # fmt: skip

    def _encoded(self, params: Params) -> dict[str, Any]:
        """Return arguments of Optuna's `create_trial`."""
        known = {name: scale for name, scale in self.box.items() if name in params}
        return {
            "params": {s.key(name): s.encode(params[name]) for name, s in known.items()},
            "distributions": {s.key(name): s.distribution() for name, s in known.items()},
        }

    def _slots(self) -> dict[int, tuple[FrozenTrial | None, list[FrozenTrial]]]:
        """Return, for each slot, the trial that counts and those that failed."""
        counting: dict[int, FrozenTrial] = {}
        failed: dict[int, list[FrozenTrial]] = {number: [] for number in self.numbers}
        for trial in self.study.get_trials(deepcopy=False):
            number = trial.user_attrs.get("slot")
            if number not in failed or trial.state == self.states.WAITING:
                continue
            if trial.state != self.states.FAIL:
                counting.setdefault(number, trial)
            elif "dropped" not in trial.user_attrs:
                failed[number].append(trial)
        return {number: (counting.get(number), failed[number]) for number in self.numbers}

    def records(self) -> list[Record]:
        """Return the trials as they are now."""
        return [self._record(n, *slot) for n, slot in self._slots().items()]

    def _record(self, number: int, trial: FrozenTrial | None, failed: list[FrozenTrial]) -> Record:
        attempts = len(failed) + bool(trial)
        state = trial.state.name.lower() if trial else "failed"
        if trial is None and not _given_up(failed):
            return Record(number, self.index + 1, "waiting", attempts=attempts)
        lost = [f.user_attrs["lost"] for f in failed if "lost" in f.user_attrs]
        reason = "" if trial else lost[-1]
        trial = trial or failed[-1]
        drawn = {n: s.decode(trial.params[s.key(n)]) for n, s in self.box.items()
                 if s.key(n) in trial.params}  # fmt: skip
        steps = [value for _, value in sorted(trial.intermediate_values.items())]
        seconds = trial.duration.total_seconds() if trial.duration else None
        return Record(number, self.index + 1, state, {**self.plan.held, **drawn}, trial.value,
                      steps, seconds, trial.user_attrs.get("worker", ""), attempts,
                      reason)  # fmt: skip

    def claim(self, worker: str) -> Trial | None:
        """Take an open slot, if there is one."""
        choose: Callable[[list[int]], int] = min
        while True:
            slots = self._slots()
            empty = [
                n for n, (trial, failed) in slots.items() if not trial and not _given_up(failed)
            ]
            if not empty:
                return None
            number = choose(empty)
            content = self._encoded(self.plan.start if number == 0 else {})
            for before in slots[number][1]:
                if len(before.params) == len(self.box):  # else they are drawn again, all of them
                    content = {"params": before.params, "distributions": before.distributions}
            content["user_attrs"] = {"slot": number, "worker": worker}
            template = self.optuna.create_trial(state=self.states.RUNNING, **content)
            mine = self.storage.create_new_trial(self.study._study_id, template)
            counts = self._slots()[number][0]
            if counts is not None and counts._trial_id == mine:
                self.study.sampler = self._sampler(number)
                return self.optuna.trial.Trial(self.study, mine)
            self._fail(mine, "dropped", True)  # another worker was faster
            choose = random.choice  # so that many workers do not all want the next one

    def _sampler(self, number: int) -> BaseSampler:
        """Return a sampler with random numbers of the slot's own."""
        seed = int(np.random.SeedSequence([self.plan.seed, number]).generate_state(1)[0])
        samplers = self.optuna.samplers
        if self.plan.sampler == "tpe":
            # Trials that still run count as bad, so that workers do not crowd.
            return samplers.TPESampler(seed=seed, constant_liar=True)
        at_random = samplers.RandomSampler(seed)
        if self.plan.sampler == "random":
            return at_random
        options = {"independent_sampler": at_random, "warn_independent_sampling": False}
        return samplers.CmaEsSampler(seed=seed, **options)

    def run(self, trial: Trial, tick: Callable[[], object]) -> None:
        """Run the objective of a claimed trial; a tick follows each value that it yields."""
        # If it has finished, this worker counted as dead, and the trial is another's.
        with suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            with self._alive(trial):
                params = {n: scale.suggest(trial, n) for n, scale in self.box.items()}
                value = self._follow(trial, {**self.plan.held, **params}, tick)
            state = self.states.PRUNED if value is None else self.states.COMPLETE
            self.study.tell(trial, value, state, skip_if_finished=True)

    def _follow(self, trial: Trial, params: Params, tick: Callable[[], object]) -> float | None:
        """Return the objective's value, None if it was stopped because it is hopeless."""
        with _blamed(params):
            steps = self.plan.objective(params)
            if not isinstance(steps, GeneratorType):
                return _number(steps)
        value: float | None = None
        with closing(_numbers(steps, params)) as numbers:
            for step, value in enumerate(numbers, 1):
                trial.report(value, step)
                tick()
                if self.plan.prune and self._hopeless(trial, step):
                    return None
        return value

    def _hopeless(self, trial: Trial, step: int) -> bool:
        """Halve successively: the worse half ends after a quarter of the steps and after half."""
        complete = self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,))
        at = rungs(max((trial.last_step or 0 for trial in complete), default=0))
        if step not in at:
            return False
        halving = self.optuna.pruners.SuccessiveHalvingPruner
        self.study.pruner = halving(min_resource=at[0], reduction_factor=2)
        return bool(trial.should_prune())

    # Optuna's heartbeats and its callback for retries work with relational databases only. These
    # work with each of its storages.

    @contextmanager
    def _alive(self, trial: Trial) -> Iterator[None]:
        """Give signs of life while a trial runs."""
        done = threading.Event()

        def give() -> None:
            for beat in itertools.count(1):
                if done.wait(BEAT):
                    return
                with suppress(Exception):  # the storage may be busy; the next one will do
                    self.storage.set_trial_user_attr(trial._trial_id, "beat", beat)

        thread = threading.Thread(target=give, name="fastbn.tune")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()  # it may hold a lock on the storage

    def _fail(self, trial_id: int, note: str, value: str | bool) -> None:
        """Set a running trial to failed, which opens its slot again.

        The note is "released", "lost" (what ended its worker) or "dropped" (another trial has the
        slot).
        """
        with suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, note, value)
            self.storage.set_trial_state_values(trial_id, self.states.FAIL)

    def release(self, worker: str, lost: str = "") -> bool:
        """Open the slot that a worker has taken, and return whether it ever took one.

        What has ended the worker counts against its trial.
        """
        trials = self.study.get_trials(deepcopy=False)
        claimed = [trial for trial in trials if trial.user_attrs.get("worker") == worker]
        for trial in claimed:
            if trial.state == self.states.RUNNING:
                self._fail(trial._trial_id, "lost" if lost else "released", lost or True)
        return bool(claimed)

    def tend(self) -> None:
        """Open the slots of workers that have given no sign of life for the time of grace.

        Signs are compared with each other, never clocks of two machines. The time between two looks
        counts as a second at most: this process may have slept as long as the one it watches.
        """
        now = time.monotonic()
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            beat = trial.user_attrs.get("beat")
            last, at, waited = self._beats.get(trial._trial_id, (beat, now, 0.0))
            waited = waited + min(now - at, 1.0) if beat == last else 0.0
            self._beats[trial._trial_id] = beat, now, waited
            if waited >= GRACE:
                self._fail(trial._trial_id, "lost", f"no sign of life for {GRACE:.0f} s")


class Search:
    """The rounds of a search, as far as they have come."""

    def __init__(self, plan: Plan, storage: BaseStorage) -> None:
        self.plan, self.storage = plan, storage
        self.rounds: list[Round] = []
        self._idle_since: float | None = None

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

    def count(self, *states: str) -> int:
        """Return how many trials have one of these states."""
        return sum(record.state in states for record in self.records())

    def release(self, worker: str, lost: str = "") -> bool:
        """Do so in all rounds."""
        return sum(each.release(worker, lost) for each in self.rounds) > 0

    def tell_waiting(self, here: str) -> None:
        """Say so once, if workers of other names have all that is left to do for a while."""
        left = [record for record in self.records() if not record.finished]
        if not left or any(r.state == "waiting" or r.worker.startswith(here) for r in left):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > SLOW:
            self._idle_since = math.inf
            which = ", ".join(f"{record.number} of {record.worker}" for record in left)
            dead = f"a worker that gives no sign of life for {GRACE:.0f} s counts as dead"
            log.warning("waiting for trial %s; %s", which, dead)

    def work(self, worker: str, tick: Callable[[], object] = lambda: None) -> None:
        """Run trials until there is nothing left to do."""
        while current := self.current():
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


def _given_up(failed: Sequence[FrozenTrial]) -> bool:
    return sum("lost" in trial.user_attrs for trial in failed) >= ATTEMPTS


@contextmanager
def _blamed(params: Params) -> Iterator[None]:
    """Note on what the objective raises that it did, and with which hyper-parameters."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"{BLAME} with {params}")
        raise


def _numbers(steps: Generator[Any, None, None], params: Params) -> Generator[float, None, None]:
    """Yield what an objective yields, and close it in the end."""
    with _blamed(params), closing(steps):
        value = None
        for value in map(_number, steps):
            yield value
        if value is None:
            raise ValueError("objective: expected at least one yield, got none")


def _number(value: Any) -> float:
    """Return what an objective gave as a float; NaN is as bad as infinity."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"objective: expected a number, got {value!r}") from None
    return math.inf if math.isnan(number) else number
