"""Rounds and their slots: what is carried over, workers that die, seen from within one process."""

import threading
import time

import pytest
from tune_objectives import bowl, space, steps, wait_until

from fastbn.tune import rounds
from fastbn.tune.rounds import Plan, Round, Search, ranked
from fastbn.tune.storage import opened

optuna = pytest.importorskip("optuna")


def test_a_round_carries_the_best_over():
    with opened(None) as storage:
        plan = Plan(steps, space, {}, {}, 40, 2, "random", True, 0, "study")
        process = Search(plan, storage)
        process.work("me")
        second = process.rounds[1]
        carried = [t for t in second.study.trials if "carried" in t.user_attrs]
        expected = ranked(process.rounds[0].records())[: len(carried)]
    assert len(carried) == 4
    assert [t.user_attrs["carried"] for t in carried] == [r.number for r in expected]
    assert [t.value for t in carried] == [r.value for r in expected]
    assert {t.state.name for t in carried} == {"COMPLETE"}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 20, 100])
def test_the_rungs_are_a_quarter_and_half(length):
    at = rounds.rungs(length)
    assert len(at) == (2 if length >= 4 else 0)
    assert all(0 < step <= length / 2 for step in at)


@pytest.fixture
def hasty(monkeypatch):
    """Let workers count as dead soon."""
    monkeypatch.setattr(rounds, "GRACE", 0.3)
    monkeypatch.setattr(rounds, "POLL", 0.02)


def new_round(storage, trials=3, objective=bowl):
    plan = Plan(objective, space, {}, {}, trials, 1, "random", True, 0, "study")
    return Round(plan, storage, None, [])


def tend_until(round_, happened):
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        round_.tend()
        time.sleep(0.02)


@pytest.mark.usefixtures("hasty")
def test_a_trial_without_a_sign_of_life_is_given_to_another():
    with opened(None) as storage:
        round_ = new_round(storage)
        dead = round_.claim("dead")
        params = {n: scale.suggest(dead, n) for n, scale in space.items()}
        tend_until(round_, lambda: round_.records()[0].state == "waiting")
        heirs = [round_.claim("heir") for _ in range(3)]
        assert round_.claim("heir") is None
        [heir] = [t for t in heirs if t.user_attrs["slot"] == 0]
        assert {n: scale.suggest(heir, n) for n, scale in space.items()} == params
        # one that counted as dead and was not: its result comes too late
        round_.run(dead, lambda: None)
        for each in heirs:
            round_.run(each, lambda: None)
        records = round_.records()
    assert [(r.state, r.worker, r.attempts) for r in records] == [
        ("complete", "heir", 2), ("complete", "heir", 1), ("complete", "heir", 1),
    ]  # fmt: skip


@pytest.mark.usefixtures("hasty")
def test_signs_of_life_keep_a_trial(monkeypatch):
    with opened(None) as storage:
        round_ = new_round(storage)
        trial = round_.claim("alive")
        for beat in range(40):
            storage.set_trial_user_attr(trial._trial_id, "beat", beat)
            round_.tend()
            time.sleep(0.02)
        assert round_.records()[0].state == "running"


def test_signs_of_life_are_given(monkeypatch):
    monkeypatch.setattr(rounds, "BEAT", 0.01)
    with opened(None) as storage:

        def until_three_signs(params):
            wait_until(lambda: storage.get_trial(trial._trial_id).user_attrs.get("beat") == 3)
            return 1.0

        round_ = new_round(storage, objective=until_three_signs)
        trial = round_.claim("alive")
        round_.run(trial, lambda: None)
        assert round_.records()[0].state == "complete"
    assert "fastbn.tune" not in {thread.name for thread in threading.enumerate()}


def test_a_process_that_slept_takes_nobody_for_dead(monkeypatch):
    monkeypatch.setattr(rounds, "GRACE", 60.0)
    clock = [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    with opened(None) as storage:
        round_ = new_round(storage)
        round_.claim("asleep as well")
        round_.tend()
        clock[0] = 3600.0
        round_.tend()
        assert round_.records()[0].state == "running"
        for _ in range(61):
            clock[0] += 1.0
            round_.tend()
        assert round_.records()[0].state == "waiting"


def test_a_trial_that_kills_its_workers_is_given_up():
    with opened(None) as storage:
        round_ = new_round(storage, trials=1)
        for attempt in range(1, 4):
            assert round_.claim(f"worker {attempt}")
            assert not round_.release("another")
            assert round_.release(f"worker {attempt}", "lost")
            assert round_.release(f"worker {attempt}", "lost")  # known already
        assert round_.claim("one more") is None
        [record] = round_.records()
    assert (record.state, record.value, record.attempts) == ("failed", None, 3)
    assert record.finished


def test_a_trial_that_is_released_is_not_given_up():
    with opened(None) as storage:
        round_ = new_round(storage, trials=1)
        for attempt in range(1, 6):
            assert round_.claim(f"worker {attempt}")
            assert round_.release(f"worker {attempt}")
            [record] = round_.records()
            assert (record.state, record.attempts) == ("waiting", attempt)


def test_a_slot_that_two_take_at_once_runs_once(monkeypatch):
    with opened(None) as storage:
        one, other = new_round(storage), new_round(storage)
        create = storage.create_new_trial
        claimed = []

        def after_another(*arguments):
            monkeypatch.setattr(storage, "create_new_trial", create)
            claimed.append(other.claim("other"))
            return create(*arguments)

        monkeypatch.setattr(storage, "create_new_trial", after_another)
        claimed += [one.claim("one") for _ in range(2)]
        assert one.claim("one") is None
        assert sorted(t.user_attrs["slot"] for t in claimed) == [0, 1, 2]
        records = one.records()
    assert [(r.state, r.attempts) for r in records] == [("running", 1)] * 3
    assert [r.worker for r in records] == ["other", "one", "one"]


@pytest.mark.usefixtures("hasty")
def test_a_round_whose_creator_died_at_once_is_taken_over():
    with opened(None) as storage:
        optuna.create_study(storage=storage, study_name="study 1")
        round_ = new_round(storage)
        assert round_.study.user_attrs["plan"] == round_.plan.about()
        assert all(round_.claim("me") for _ in range(3))
        assert [r.state for r in round_.records()] == ["running"] * 3


def test_trials_that_wait_in_the_storage_are_left_alone():
    # Earlier versions, and `Study.enqueue_trial`, leave such ones.
    waiting = optuna.trial.TrialState.WAITING
    with opened(None) as storage:
        round_ = new_round(storage)
        round_.study.add_trial(optuna.create_trial(state=waiting, user_attrs={"slot": 1}))
        round_.study.enqueue_trial({})
        assert [round_.claim("me").user_attrs["slot"] for _ in range(3)] == [0, 1, 2]
        assert round_.claim("me") is None
