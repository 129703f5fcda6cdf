"""The search in one process: rounds, tiers, samplers, pruning, errors, a study that resumes."""

import subprocess
import sys
from collections import Counter

import pytest
from tune_objectives import Logged, bowl, content, quiet, space, start, steps

from fastbn.demo import DemoError
from fastbn.tune import choice, log_uniform, rounds, uniform
from fastbn.tune.rounds import ranked

pytest.importorskip("optuna")
pytest.importorskip("cmaes")


@pytest.mark.parametrize("sampler", rounds.SAMPLERS)
def test_it_finds_the_bottom(sampler):
    result = quiet(sampler=sampler, trials=60)
    assert len(result.trials) == 60
    assert [r.number for r in result.trials] == list(range(60))
    assert {r.state for r in result.trials} == {"complete"}
    assert result.value == min(r.value for r in result.trials) == bowl(result.best)
    assert result.value < 0.02


def test_the_seed_decides():
    one, same, other = (quiet(seed=seed) for seed in (4, 4, 5))
    assert content(one) == content(same) != content(other)


def test_the_start_comes_first():
    first = quiet(start=start, trials=4).trials[0]
    assert first.params == start
    assert first.value == bowl(start)


def test_a_round_searches_around_the_best_few():
    result = quiet(trials=30, rounds=3)
    assert Counter(r.round for r in result.trials) == {1: 10, 2: 10, 3: 10}
    assert result.boxes[0] == space
    for number in (2, 3):
        before = [r for r in result.trials if r.round < number]
        box = result.boxes[number - 1]
        for r in ranked(before)[:3]:
            assert all(r.params[name] in box[name] for name in space)
        for r in result.trials:
            if r.round == number:
                assert all(r.params[name] in box[name] for name in space)
    widths = [space["lr"].position(b["lr"].high) - space["lr"].position(b["lr"].low)
              for b in result.boxes]  # fmt: skip
    assert widths[0] == 1
    assert min(widths[1:]) < 1


def test_rounds_are_split_evenly_and_by_default_in_two():
    assert Counter(r.round for r in quiet(trials=7, rounds=3).trials) == {1: 3, 2: 2, 3: 2}
    assert Counter(r.round for r in quiet(trials=7).trials) == {1: 4, 2: 3}
    assert {r.round for r in quiet(trials=7, sampler="tpe").trials} == {1}
    assert len(quiet(trials=1).trials) == 1


TIERS = [{"lr": space["lr"]}, {"momentum": space["momentum"], "units": space["units"]},
         {"kind": space["kind"]}]  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "held"),
    [(1, {"momentum", "units", "kind"}), (17, {"momentum", "units", "kind"}), (18, {"kind"}),
     (23, {"kind"}), (24, set())],
)  # fmt: skip
def test_a_small_budget_tunes_the_first_tiers(trials, held):
    for given in (None, start):
        result = quiet(where=TIERS, trials=trials, start=given)
        middle = {name: scale.at(0.5) for name, scale in space.items()}
        for r in result.trials:
            assert {name: r.params[name] for name in held} == {
                name: (given or middle)[name] for name in held
            }
        assert result.boxes[0].keys() == space.keys() - held
        assert result.best.keys() == space.keys()


def test_halving_stops_the_hopeless():
    result = quiet(steps, trials=40, rounds=1)
    lengths = Counter(len(r.steps) for r in result.trials)
    assert lengths.keys() == {2, 4, 8}  # a quarter, half, all
    assert {r.state for r in result.trials if len(r.steps) < 8} == {"pruned"}
    complete = [r for r in result.trials if len(r.steps) == 8]
    assert {r.state for r in complete} == {"complete"}
    assert 5 <= len(complete) <= 15
    assert all(r.value == r.steps[-1] for r in result.trials)
    assert result.value == pytest.approx(min(bowl(r.params) for r in complete) + 1 / 8)
    # what was stopped was worse than half of what was compared with it
    firsts = [r.steps[1] for r in result.trials]
    assert min(firsts) in [r.steps[1] for r in complete]


def test_without_pruning_all_trials_end():
    result = quiet(steps, trials=12, prune=False)
    assert {(r.state, len(r.steps)) for r in result.trials} == {("complete", 8)}


def test_infinity_and_nan_are_the_worst():
    def diverging(params):
        if params["lr"] > 0.1:
            return float("nan")
        return float("inf") if params["lr"] > 0.01 else 1.0

    result = quiet(diverging)
    assert result.best["lr"] <= 0.01
    assert {r.value for r in result.trials} == {1.0, float("inf")}
    with pytest.raises(DemoError, match="objective: expected a finite number, got none in 4"):
        quiet(lambda _: float("inf"), trials=4)


def test_a_generator_that_is_stopped_is_closed():
    closed = []

    def yielding(params):
        try:
            yield from steps(params)
        finally:
            closed.append(1)

    quiet(yielding, trials=12)
    assert len(closed) == 12


def test_importances_tell_what_matters():
    pytest.importorskip("sklearn")
    result = quiet(lambda p: abs(space["lr"].position(p["lr"]) - 0.5), trials=60, rounds=1)
    assert result.importances.keys() == space.keys()
    assert sum(result.importances.values()) == pytest.approx(1)
    assert result.importances["lr"] > 0.8
    assert quiet(lambda _: 1.0, trials=5).importances == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, DemoError, "trials: expected an integer from 1, got 0"),
        ({"trials": 2.0}, DemoError, "trials: expected an integer from 1, got 2.0"),
        ({"workers": 0}, DemoError, "workers: expected an integer from 1, got 0"),
        ({"seed": -1}, DemoError, "seed: expected an integer from 0, got -1"),
        ({"trials": 3, "rounds": 4}, DemoError, "rounds: expected an integer from 1 to 3 trials"),
        ({"rounds": 0}, DemoError, "rounds: expected an integer from 1 to 40 trials, got 0"),
        ({"sampler": "grid"}, DemoError, "sampler: expected random or tpe or cmaes, got 'grid'"),
        ({"objective": 5}, TypeError, "objective: expected a function, got 5"),
        ({"start": {"lr": 0.1}}, DemoError, "start: expected lr, momentum, units, kind, got lr"),
        ({"start": {**start, "lr": 2.0}}, DemoError, "start: lr: expected a value of Log.* got 2"),
        ({"start": {**start, "units": 2.0}}, DemoError, "start: units: expected a value of Int"),
        ({"objective": lambda _: "x"}, TypeError, "objective: expected a number, got 'x'"),
        ({"objective": lambda _: None}, TypeError, "objective: expected a number, got None"),
        ({"objective": lambda _: (yield from ())}, ValueError, "expected at least one yield"),
        ({"objective": lambda _: 1.0, "workers": 2}, DemoError, "expected a function of a module"),
        ({"storage": "grpc://here"}, DemoError, "storage: expected grpc://HOST:PORT, got grpc"),
        ({"storage": "nosuch://x"}, DemoError, "storage: nosuch://x: cannot be used: "),
        ({"storage": "sqlite:////no/such/folder/x.db"}, DemoError, "cannot be used: .*unable to"),
    ],
)
def test_errors(options, error, message):
    if "grpc" in options.get("storage", ""):
        pytest.importorskip("grpc")
    with pytest.raises(error, match=message):
        quiet(**options)


def test_optuna_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DemoError, match=r'pip install "fastbn\[tune\]"'):
        quiet()


def test_fastbn_alone_imports_none_of_it():
    code = (
        "import sys, fastbn; assert not {'optuna', 'fastbn.tune', 'fastbn.demo'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_of_the_objective_ends_the_search_and_loses_nothing(tmp_path):
    storage = str(tmp_path / "journal")
    calls = []

    def sometimes(params):
        calls.append(params)
        if len(calls) == 3:
            raise ArithmeticError("no value")
        return bowl(params)

    with pytest.raises(ArithmeticError, match="no value"):
        quiet(sometimes, trials=6, storage=storage)
    result = quiet(sometimes, trials=6, storage=storage)
    assert content(result) == content(quiet(trials=6))
    assert len(calls) == 7
    assert calls[2] == calls[3]  # the trial that failed came again
    assert [r.attempts for r in result.trials] == [1, 1, 2, 1, 1, 1]


def test_a_study_resumes_and_knows_its_plan(tmp_path):
    storage = str(tmp_path / "journal")
    first = quiet(trials=8, storage=storage)
    called = Logged(str(tmp_path / "log"))
    assert content(quiet(trials=8, storage=storage)) == content(first)
    for options, message in [
        ({"trials": 9}, "trials: expected 8 as in the study 'study', got 9; another name makes"),
        ({"seed": 1}, "seed: expected 0 as in the study 'study', got 1"),
        ({"where": {"lr": uniform(0, 1)}}, "space: expected .* as in the study"),
        ({"objective": called}, "objective: expected .*bowl as in the study 'study', got Logged"),
    ]:
        with pytest.raises(DemoError, match=message):
            quiet(**{"trials": 8, "storage": storage, **options})
    assert not (tmp_path / "log").exists()
    assert len(quiet(trials=9, storage=storage, study="other").trials) == 9


def test_choice_alone_and_log_alone():
    assert quiet(lambda p: p["x"], where={"x": choice(3, 1, 2)}, trials=12).best == {"x": 1}
    assert quiet(lambda p: p["x"], where={"x": log_uniform(1, 10)}, trials=12).value < 3
