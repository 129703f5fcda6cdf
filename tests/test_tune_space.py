"""The scales: exact ends, inverse maps, the right spread, zoom, every error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbn.tune import choice, integer, log_uniform, one_minus_log_uniform, uniform
from fastbn.tune.space import tiers_of

SCALES = [
    uniform(-3, 5),
    log_uniform(1e-4, 1),
    log_uniform(3e-7, 0.7),
    one_minus_log_uniform(0.9, 0.999),
    one_minus_log_uniform(0, 0.99999),
    one_minus_log_uniform(0.1, 0.3),
    integer(2, 9),
    integer(4, 4),
    choice("a", None, 3, 0.5, True),
]
CONTINUOUS = SCALES[:6]
positions = st.floats(0, 1)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_the_ends_are_exact(scale):
    ends = (scale.at(0), scale.at(1))
    options = getattr(scale, "options", None)
    assert ends == ((options[0], options[-1]) if options else (scale.low, scale.high))
    assert scale.position(ends[0]) == 0
    assert scale.position(ends[1]) == (ends[0] != ends[1])


@pytest.mark.parametrize("scale", CONTINUOUS, ids=str)
@given(u=positions)
def test_there_and_back(scale, u):
    value = scale.at(u)
    assert value in scale
    assert scale.position(value) == pytest.approx(u, abs=1e-11)
    assert scale.at(scale.position(value)) == pytest.approx(value, rel=1e-11, abs=1e-11)


@given(low=st.integers(-1000, 1000), size=st.integers(0, 1000), data=st.data())
def test_there_and_back_with_integers(low, size, data):
    scale = integer(low, low + size)
    value = data.draw(st.integers(low, low + size))
    assert scale.at(scale.position(value)) == value


@pytest.mark.parametrize("scale", SCALES, ids=str)
@given(u=positions, v=positions)
def test_order_is_kept(scale, u, v):
    u, v = sorted((u, v))
    assert scale.position(scale.at(u)) <= scale.position(scale.at(v))


@pytest.mark.parametrize("scale", SCALES, ids=str)
@given(u=positions)
def test_optuna_can_keep_a_value(scale, u):
    pytest.importorskip("optuna")
    value = scale.at(u)
    distribution = scale.distribution()
    encoded = scale.encode(value)
    assert distribution._contains(distribution.to_internal_repr(encoded))
    decoded = scale.decode(encoded)
    assert decoded in scale
    if value in (scale.at(0), scale.at(1)) or not isinstance(value, float):
        assert decoded == value
    else:
        assert decoded == pytest.approx(value, rel=1e-12, abs=1e-12)


def test_the_middle_of_the_course():
    assert log_uniform(1e-4, 1).at(0.5) == 0.01
    assert one_minus_log_uniform(0.9, 0.999).at(0.5) == pytest.approx(0.99, abs=1e-15)


@pytest.mark.parametrize(
    ("scale", "edges"),
    [
        (log_uniform(1e-4, 1), [1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (one_minus_log_uniform(0.9, 0.9999), [0.9, 0.99, 0.999, 0.9999]),
        (uniform(0, 4), [0, 1, 2, 3, 4]),
        (integer(1, 4), [0.5, 1.5, 2.5, 3.5, 4.5]),
        (choice(0, 1, 2), [-0.5, 0.5, 1.5, 2.5]),
    ],
    ids=str,
)
def test_optuna_draws_as_the_scale_says(scale, edges):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [scale.suggest(study.ask(), "x") for _ in range(400)]
    also = [scale.at((k + 0.5) / 400) for k in range(400)]
    for values in (drawn, also):
        counts, _ = np.histogram(values, edges)
        expected = 400 / (len(edges) - 1)
        assert counts.sum() == 400
        assert abs(counts - expected).max() < 4 * math.sqrt(expected)


@pytest.mark.parametrize("scale", CONTINUOUS, ids=str)
@given(us=st.lists(positions, min_size=1, max_size=5))
def test_zoom(scale, us):
    values = [scale.at(u) for u in us]
    box = scale.zoom(values, scale)
    assert type(box) is type(scale)
    assert scale.low <= box.low <= min(values)
    assert max(values) <= box.high <= scale.high
    assert scale.position(box.low) == pytest.approx(max(min(us) - 0.1, 0), abs=1e-9)
    assert scale.position(box.high) == pytest.approx(min(max(us) + 0.1, 1), abs=1e-9)
    # from a box the margin is that much smaller, and the box may go beyond it
    inner = scale.zoom([box.at(0), box.at(0)], box)
    assert scale.low <= inner.low <= box.low
    assert inner.high < box.high


@given(st.lists(st.integers(-50, 50), min_size=1), st.integers(-60, -50), st.integers(50, 60))
def test_zoom_of_integers(values, low, high):
    box = integer(low, high).zoom(values, integer(low, high))
    assert low <= box.low <= min(values) <= max(values) <= box.high <= high


def test_zoom_of_a_choice_keeps_what_was_good_in_its_order():
    scale = choice(16, 32, 64, 128)
    assert scale.zoom([128, 32, 128], scale) == choice(32, 128)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_ticks_lie_on_the_scale(scale):
    assert scale.ticks()
    assert all(tick in scale for tick in scale.ticks())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: uniform("a", 1), TypeError, "low: expected a number, got 'a'"),
        (lambda: uniform(0, True), TypeError, "high: expected a number, got True"),
        (lambda: uniform(0, math.inf), ValueError, "high: expected a finite number, got inf"),
        (lambda: uniform(1, 1), ValueError, "high: expected a number above low = 1, got 1"),
        (lambda: log_uniform(0, 1), ValueError, "low: expected a number above 0, got 0"),
        (lambda: log_uniform(2, 1), ValueError, "high: expected a number above low = 2, got 1"),
        (lambda: one_minus_log_uniform(0.9, 1), ValueError, "high: expected a number below 1"),
        (lambda: one_minus_log_uniform(-1, 0.5), ValueError, "low: expected a number from 0"),
        (lambda: integer(1, 2.0), TypeError, "high: expected an integer, got 2.0"),
        (lambda: integer(3, 2), ValueError, "high: expected an integer from low = 3, got 2"),
        (lambda: choice(), ValueError, "options: expected at least one, got none"),
        (lambda: choice(1, (2,)), TypeError, "options: expected numbers, text, .* got \\(2,\\)"),
        (lambda: choice("a", "a"), ValueError, "options: expected different ones, got 'a' twice"),
        (lambda: tiers_of("lr"), TypeError, "space: expected a dict or a list of them, got str"),
        (lambda: tiers_of([1]), TypeError, "space: expected a dict for each tier, got int"),
        (lambda: tiers_of({1: uniform(0, 1)}), TypeError, "space: expected names as keys, got 1"),
        (lambda: tiers_of({"a": (0, 1)}), TypeError, "space: a: expected a scale like log_uniform"),
        (
            lambda: tiers_of([{"a": uniform(0, 1)}, {"a": uniform(0, 1)}]),
            ValueError,
            "space: expected each name once, got 'a' in two tiers",
        ),
        (lambda: tiers_of([{}]), ValueError, "space: expected at least one hyper-parameter"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
