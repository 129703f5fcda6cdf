"""Batch renormalisation: against its formula in float64, and beside batch norm."""

import copy
import re

import numpy as np
import pytest
from layer_cases import assert_unchanged, snapshot
from support import assert_close

import fastbn
from fastbn import BatchNorm

SHAPES = [((6, 3), 1), ((3, 8), 0), ((4, 3, 5, 5), 1), ((4, 5, 5, 3), -1), ((2, 3, 40), 1)]


def column(values, ndim, axis):
    """Shape one value per channel so that it broadcasts against x."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(values, np.float64).reshape(shape)


class Formula:
    """y = gamma * (z_hat * r + d) + beta of one layer and minibatch; r and d are constants."""

    def __init__(self, bn, x):
        r_max, d_max = bn.renorm
        self.axis, self.ndim, self.eps = bn.axis, x.ndim, bn.eps
        self.gamma, self.beta = (
            column(bn.params.get(name, value), x.ndim, bn.axis)
            for name, value in (("gamma", [1]), ("beta", [0]))
        )
        mean, std = self.statistics(x)
        running_mean = column(bn.running_mean, x.ndim, bn.axis)
        running_std = np.sqrt(column(bn.running_var, x.ndim, bn.axis) + bn.eps)
        self.r = np.clip(std / running_std, 1 / r_max, r_max)
        self.d = np.clip((mean - running_mean) / running_std, -d_max, d_max)

    def statistics(self, x):
        others = tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
        x = x.astype(np.float64)
        return x.mean(others, keepdims=True), np.sqrt(x.var(others, keepdims=True) + self.eps)

    def __call__(self, x, gamma=None, beta=None):
        gamma = self.gamma if gamma is None else gamma
        beta = self.beta if beta is None else beta
        mean, std = self.statistics(x)
        return gamma * ((x.astype(np.float64) - mean) / std * self.r + self.d) + beta


def trained(rng, shape, axis, renorm, **options):
    """Return a layer whose running statistics are some steps away from what comes next."""
    bn = BatchNorm(3, axis=axis, renorm=renorm, **options)
    for _ in range(3):
        bn(2 + 3 * rng.standard_normal(shape))
    if bn.affine:
        bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    return bn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("renorm", [(1, 0), (1.25, 0.25), (3, 5), (np.inf, np.inf)])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_y_and_running_statistics_follow_the_formula(variant, rng, shape, axis, renorm, dtype):
    bn = trained(rng, shape, axis, renorm)
    plain = BatchNorm(3, axis=axis)
    plain.load_state_dict(bn.state_dict())
    for _ in range(3):
        x = (1 + 2 * rng.standard_normal(shape)).astype(dtype)
        formula = Formula(bn, x)
        shift = formula.gamma * formula.d + formula.beta  # y may be a small difference
        wanted = formula(x)
        scale = max(abs(part).max() for part in (wanted, wanted - shift, shift))
        assert_close(bn(x), wanted, scale=scale)
        plain(x)
        assert_unchanged(bn, snapshot(plain))  # they move as those of batch norm do, bit for bit


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("renorm", [(1.25, 0.25), (3, 5)])
def test_gradients_are_those_of_finite_differences(rng, shape, axis, renorm):
    bn = trained(rng, shape, axis, renorm, dtype=np.float64)
    x, dy = rng.standard_normal((2, *shape))
    x = 1 + 2 * x
    formula = Formula(bn, x)
    bn(x)
    dx = bn.backward(dy)

    def slope(loss, at, step=1e-5):
        """Return the gradient of a loss by central differences."""
        found = np.zeros(at.shape)
        for i in np.ndindex(at.shape):
            ahead, behind = at.copy(), at.copy()
            ahead[i] += step
            behind[i] -= step
            found[i] = (loss(ahead) - loss(behind)) / (2 * step)
        return found

    def close(actual, wanted):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-7 * max(1, abs(wanted).max()))

    close(dx, slope(lambda v: (dy * formula(v)).sum(), x))
    gamma, beta = formula.gamma, formula.beta
    wanted = slope(lambda v: (dy * formula(x, gamma=v)).sum(), gamma)
    close(bn.grads["gamma"], wanted.ravel())
    wanted = slope(lambda v: (dy * formula(x, beta=v)).sum(), beta)
    close(bn.grads["beta"], wanted.ravel())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_without_a_correction_the_bits_are_those_of_batch_norm(rng, shape, axis, activation, dtype):
    x, residual, dy = (rng.standard_normal((3, *shape)) + 10).astype(dtype)
    renormed, plain = (
        BatchNorm(3, axis=axis, activation=activation, renorm=renorm) for renorm in ((1, 0), None)
    )
    for bn in (renormed, plain):
        bn.gamma, bn.beta = [1, -2, 3], [3, 2, 1]
    for _ in range(2):
        ys = renormed(x, residual=residual), plain(x, residual=residual)
        np.testing.assert_array_equal(*ys)
        for left, right in zip(renormed.backward(dy), plain.backward(dy), strict=True):
            np.testing.assert_array_equal(left, right)
        assert_unchanged(renormed, snapshot(plain))


def test_within_its_limits_training_gives_what_evaluation_gives(rng):
    bn = trained(rng, (4, 3, 5), 1, (100, 100), activation="leaky_relu")
    twin = copy.deepcopy(bn).eval()
    x, residual = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    assert_close(bn(x, residual), twin(x, residual), scale=10)
    # But the gradient also goes through the statistics of the minibatch.
    dy = np.ones_like(x)
    assert abs(bn.backward(dy)[0] - twin.backward(dy)[0]).max() > 1e-3


@pytest.mark.parametrize("mean", [0, 1e4, 1e6])
def test_digits_are_kept_where_the_mean_is_large(variant, rng, mean):
    bn = BatchNorm(3, renorm=(3, 5))
    bn.running_mean[:] = mean - 0.5
    x = (mean + rng.standard_normal((4, 3, 200))).astype(np.float32)
    formula = Formula(bn, x)
    assert_close(bn(x), formula(x))


def test_a_mask_is_kept_out_and_without_affine_the_correction_is_all(rng):
    x, mask = rng.standard_normal((6, 9, 3)), rng.random((6, 9)) < 0.5
    bn, rows = (BatchNorm(3, axis=-1, renorm=(1.5, 0.5), affine=affine) for affine in (False, True))
    y, wanted = bn(x, mask=mask), rows(x[mask])
    np.testing.assert_array_equal(y[mask], wanted)
    np.testing.assert_array_equal(bn.backward(x)[mask], rows.backward(x[mask]))
    assert not y[~mask].any()
    assert abs(wanted.mean(axis=0)).max() > 0.01  # the correction did something


def test_evaluation_and_frozen_layers_have_no_correction(rng):
    bn, plain = BatchNorm(3, renorm=(3, 5)), BatchNorm(3)
    x = 2 + rng.standard_normal((8, 3)).astype(np.float32)
    for norm in (bn, plain):
        norm(x)
    np.testing.assert_array_equal(bn.eval()(x), plain.eval()(x))
    np.testing.assert_array_equal(bn.train().freeze()(x), plain.eval()(x))
    np.testing.assert_array_equal(bn.backward(x), plain.backward(x))


def test_the_limits_may_change_between_steps(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32) + 3
    bn, plain = BatchNorm(3, renorm=(1, 0)), BatchNorm(3)
    np.testing.assert_array_equal(bn(x), plain(x))
    bn.renorm = [3, 5]
    assert bn.renorm == (3, 5)
    formula = Formula(bn, x)
    assert_close(bn(x), formula(x))
    plain(x)
    bn.renorm = None
    np.testing.assert_array_equal(bn(x), plain(x))
    assert repr(bn) == repr(plain)
    bn.renorm = (3, 5)
    assert repr(bn).endswith("virtual_batch_size=None, renorm=(3, 5))")


def test_exact_statistics_are_taken_of_a_renormalised_layer_too(rng):
    bn = BatchNorm(3, renorm=(3, 5))
    batches = [rng.standard_normal((5, 3)) + 4 for _ in range(3)]
    fastbn.update_statistics([bn], batches)
    np.testing.assert_allclose(bn.running_mean, np.concatenate(batches).mean(0), rtol=1e-14)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"renorm": 3}, TypeError, "renorm: expected None or two numbers, r_max >= 1"),
        ({"renorm": "35"}, TypeError, "renorm: expected None or two numbers, r_max >= 1"),
        ({"renorm": (3,)}, ValueError, "r_max >= 1 and d_max >= 0, got (3,)"),
        ({"renorm": (0.5, 1)}, ValueError, "r_max >= 1 and d_max >= 0, got (0.5, 1)"),
        ({"renorm": (3, -1)}, ValueError, "r_max >= 1 and d_max >= 0, got (3, -1)"),
        ({"renorm": (np.nan, 1)}, ValueError, "r_max >= 1 and d_max >= 0, got (nan, 1)"),
        ({"renorm": (True, 1)}, ValueError, "r_max >= 1 and d_max >= 0, got (True, 1)"),
        (
            {"renorm": (3, 5), "virtual_batch_size": 4},
            ValueError,
            "renorm: expected None where there is a virtual_batch_size",
        ),
        (
            {"renorm": (3, 5), "track_running_stats": False},
            ValueError,
            "renorm: expected None where there are no running statistics",
        ),
    ],
)
def test_limits_that_cannot_be(rng, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BatchNorm(3, **options)
    bn = BatchNorm(3)
    before = snapshot(bn)
    if "track_running_stats" in options:
        bn.running_mean = bn.running_var = None
    with pytest.raises(error, match=re.escape(message)):  # noqa: PT012  # either may refuse
        for name, value in options.items():
            setattr(bn, name, value)
        bn(rng.standard_normal((6, 3)))
    if "track_running_stats" not in options:
        assert_unchanged(bn, before)
