"""float16 and bfloat16: storage types, computed in float32 and rounded once."""

import numpy as np
import pytest
from support import MEANS_AND_STDS, assert_close, exact_batch_norm, finfo
from test_functional import MEMORY
from test_kernels import LAYOUTS

import fastbn

EVERY_BIT_PATTERN = np.arange(1 << 16, dtype=np.uint16)
SHAPES = [(1, 1, 1 << 16), (1, 64, 1024), (4, 512, 32), (1 << 15, 2, 1), (1 << 9, 1 << 7, 1)]


def test_errors_are_half_a_unit_of_rounding_and_two_eps_of_float32(variant, short, rng):
    for (shape, axis), (mean, std) in zip(LAYOUTS.values(), MEANS_AND_STDS, strict=True):
        if mean + 5 * std > float(finfo(short).max) or std < finfo(short).smallest_subnormal:
            mean, std = 30, 2
        x = (mean + std * rng.standard_normal(shape)).astype(short)
        dy = rng.standard_normal(shape).astype(short)
        gamma = (1 + 0.1 * rng.standard_normal(shape[axis])).astype(np.float32)
        beta = rng.standard_normal(shape[axis]).astype(np.float32)
        y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
        assert y.dtype == dx.dtype == short
        assert dgamma.dtype == dbeta.dtype == np.float32
        exact = exact_batch_norm(x, gamma, beta, dy, axis)
        for actual, wanted in zip((y, dx, dgamma, dbeta), exact[:4], strict=True):
            assert_close(actual, wanted)
        again = fastbn.batch_norm_inference(x, cache.mean, cache.var, gamma, beta, axis=axis)
        assert_close(again, exact[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_survives_a_scale_of_one(variant, short, shape):
    x = EVERY_BIT_PATTERN.view(short).reshape(shape)
    y = fastbn.batch_norm_inference(x, np.zeros(shape[1]), np.ones(shape[1]), eps=0)
    with np.errstate(invalid="ignore"):  # half of the NaNs are signalling ones
        np.testing.assert_array_equal(y.astype(float), x.astype(float))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1 / 3, 0.75, 3, 1e4, 2**-12, 2**-20])
def test_results_are_rounded_once_to_nearest_even(variant, short, shape, scale):
    # Ties (0.75), values beyond the largest (1e4: infinity), subnormal ones (2**-12).
    x = EVERY_BIT_PATTERN.view(short).reshape(shape)
    gamma = np.full(shape[1], scale, np.float32)
    y = fastbn.batch_norm_inference(x, np.zeros(shape[1]), np.ones(shape[1]), gamma, eps=0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wanted = (x.astype(np.float32) * np.float32(scale)).astype(short)
    np.testing.assert_array_equal(y.astype(float), wanted.astype(float))


def test_what_is_too_large_becomes_infinite(variant, short):
    x = np.tile(np.array([[-1], [1]]), (40, 17)).astype(short)
    y, cache = fastbn.batch_norm(x, np.full(17, 2 * float(finfo(short).max)))
    np.testing.assert_array_equal(y.astype(float), np.where(x > 0, np.inf, -np.inf))
    np.testing.assert_array_equal(cache.mean, 0)


def test_subnormal_values_are_told_apart(variant, short, rng):
    step = float(finfo(short).smallest_subnormal)
    for shape in [(8, 3, 40), (90, 3, 1)]:
        x = (rng.integers(1, 50, shape) * step).astype(short)
        assert (x.astype(float) >= step).all()
        y, cache = fastbn.batch_norm(x, eps=0)
        exact = exact_batch_norm(x, np.ones(3), np.zeros(3), x, 1, eps=0)
        np.testing.assert_allclose(cache.mean, exact[4].astype(float), rtol=1e-12)
        np.testing.assert_allclose(cache.var, exact[5].astype(float), rtol=1e-12)
        if short == np.float16:  # 1 / std of those of bfloat16 is beyond float32
            assert_close(y, exact[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_channel(variant, short, rng, bad):
    for shape, axis in LAYOUTS.values():
        clean = rng.standard_normal(shape).astype(short)
        dirty = clean.copy()
        np.moveaxis(dirty, axis, 0)[1].flat[7] = bad
        others = np.arange(shape[axis]) != 1
        results = []
        for x in (clean, dirty):
            y, cache = fastbn.batch_norm(x, axis=axis)
            dx, *_ = fastbn.batch_norm_backward(clean, cache)
            results.append([np.moveaxis(a, axis, 0).astype(float) for a in (y, dx)])
        for wanted, actual in zip(*results, strict=True):
            np.testing.assert_array_equal(actual[others], wanted[others])
            assert not np.isfinite(actual[1]).any()


def test_gradients_have_the_dtype_of_the_parameters_or_float32(short, rng):
    x = rng.standard_normal((6, 3)).astype(short)
    parameters = {
        np.float32: np.ones(3, np.float32), np.float64: np.ones(3), short: np.ones(3, short),
    }  # fmt: skip
    for dtype, parameter in parameters.items():
        _, cache = fastbn.batch_norm(x, parameter, parameter)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(x, cache)
        assert dx.dtype == short
        assert dgamma.dtype == dbeta.dtype == dtype
    for parameter in (None, [1, 1, 1], np.ones(3, int)):
        _, cache = fastbn.batch_norm(x, parameter, parameter)
        _, dgamma, dbeta = fastbn.batch_norm_backward(x, cache)
        assert dgamma.dtype == dbeta.dtype == np.float32


@pytest.mark.parametrize("memory", ["Fortran order", "channels last", "every other", "misaligned"])
def test_any_memory_is_read_right(short, rng, memory):
    plain, plain_dy = rng.standard_normal((2, 4, 5, 6, 7)).astype(short)
    exact = exact_batch_norm(plain, np.ones(5), np.zeros(5), plain_dy, 1)
    x, dy = MEMORY[memory](plain), MEMORY[memory](plain_dy)
    y, cache = fastbn.batch_norm(x)
    assert y.dtype == short
    assert_close(y, exact[0])
    assert_close(fastbn.batch_norm_backward(dy, cache)[0], exact[1])
    assert_close(fastbn.batch_norm(plain, out=x.copy(order="K"))[0], exact[0])


def test_byte_swapped_float16_is_read_right(rng):
    x = rng.standard_normal((4, 5, 6)).astype(np.float16)
    wanted, _ = fastbn.batch_norm(x)
    y, _ = fastbn.batch_norm(x.astype(x.dtype.newbyteorder()))
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, wanted)


def test_the_dtypes_are_not_mixed_up(short):
    x = np.ones((4, 3), short)
    _, cache = fastbn.batch_norm(x)
    with pytest.raises(TypeError, match=f"dy: expected dtype {short}, as x has, got float32"):
        fastbn.batch_norm_backward(x.astype(np.float32), cache)
    with pytest.raises(ValueError, match=rf"out: expected shape \(4, 3\) and dtype {short}, as x"):
        fastbn.batch_norm(x, out=np.empty((4, 3), np.uint16))


def test_a_layer_of_float32_takes_them(short, rng):
    bn = fastbn.BatchNorm(3)
    x = rng.standard_normal((6, 3)).astype(short)
    assert bn(x).dtype == bn.backward(x).dtype == short
    assert bn.grads["gamma"].dtype == np.float32
