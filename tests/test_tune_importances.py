"""Importances: the shares of functions that are known, and what cannot be told."""

import math

import numpy as np
import pytest
from tune_objectives import quiet

from fastbn.tune import choice, integer, log_uniform, one_minus_log_uniform, uniform

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

LR = log_uniform(1e-4, 1)
TINY = log_uniform(1e-12, 1e-8)
BETA = one_minus_log_uniform(0.9, 0.999)
X = uniform(0, 1)

# A step of a scale into n equal parts, and something smaller within each: the ranks are even, and
# their variance within a part is 1 / n^2 of the whole.
KNOWN = {
    "log": ({"lr": LR, "x": X}, lambda p: (p["lr"] < 0.01) + 0.2 * p["x"], {"lr": 3 / 4}),
    "one minus log": (
        {"beta": BETA, "lr": LR},
        lambda p: (p["beta"] > 0.99) + 0.9 * LR.position(p["lr"]),
        {"beta": 3 / 4},
    ),
    "integer": (
        {"n": integer(1, 4), "beta": BETA},
        lambda p: p["n"] + BETA.position(p["beta"]),
        {"n": 15 / 16},
    ),
    "choice": (
        {"kind": choice("a", "b", 3), "x": X, "n": integer(5, 5)},
        lambda p: {"a": 2, "b": 0, 3: 1}[p["kind"]] + p["x"],
        {"kind": 8 / 9, "n": 0},
    ),
    "a sum": (
        {"tiny": TINY, "x": X, "kind": choice(1, 2, 3)},
        lambda p: TINY.position(p["tiny"]) + p["x"],
        {"tiny": 1 / 2, "x": 1 / 2},
    ),
}


def error(name, **options):
    space, objective, shares = KNOWN[name]
    found = [quiet(objective, space, trials=60, seed=seed, **options).importances
             for seed in range(5)]  # fmt: skip
    for each in found:
        assert each.keys() == space.keys()
        assert sum(each.values()) == pytest.approx(1)
        assert min(each.values()) >= 0
    return max(abs(np.mean([each[n] for each in found]) - shares[n]) for n in shares)


@pytest.mark.parametrize("name", KNOWN)
def test_known_shares(name):
    assert error(name) < 0.15


@pytest.mark.long
@pytest.mark.parametrize("options", [{"rounds": 1}, {"rounds": 3}, {"sampler": "tpe"}], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_known_shares_however_it_was_searched(name, options):
    # TPE crowds where nothing tells how much, so ranks and shares are those of its trials.
    assert error(name, **options) < (0.3 if "sampler" in options else 0.15)


def test_one_hyper_parameter_on_a_scale_far_from_1():
    space = {"eps": TINY, "x": X}
    found = quiet(lambda p: math.log(p["eps"]), space, trials=40).importances
    assert found["eps"] > 0.95


@pytest.mark.parametrize(
    ("space", "objective", "trials"),
    [
        ({"x": X}, lambda _: 1.0, 40),
        ({"x": X}, lambda p: p["x"], 9),
        ({"n": integer(5, 5), "kind": choice("a")}, lambda _, values=[]: values.append(0) or
         len(values) % 7, 40),
        ({"x": X, "lr": LR}, lambda p: (p["x"] * 7919) % 1, 40),
    ],
    ids=["one value", "too few trials", "scales of one value", "noise"],
)  # fmt: skip
def test_what_cannot_be_told(space, objective, trials):
    assert quiet(objective, space, trials=trials).importances == {}
