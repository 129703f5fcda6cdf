"""The numerical promises, through the public functions, in every kernel variant."""

from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, KERNELS, MEANS_AND_STDS, assert_close, exact_batch_norm, python

import fastbn
from fastbn import functional
from fastbn.kernels import variants

LAYOUTS = {
    "NCHW": ((32, 8, 28, 28), 1),
    "NCHW, small": ((32, 40, 7, 7), 1),
    "NCHW, one long run": ((1, 3, 130, 100), 1),
    "NCHW, tiny": ((32, 40, 2, 2), 1),
    "NHWC": ((32, 28, 28, 8), -1),
    "NHWC, 3 channels": ((5, 28, 28, 3), -1),
    "NC": ((256, 70), 1),
    "NC, wider than a panel": ((12, 9001), 1),
    "(n_h, m)": ((20, 500), 0),
}


@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_at_most_two_eps(variant, rng, layout, mean, std):
    shape, axis = LAYOUTS[layout]
    channels = shape[axis]
    x = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    gamma = (1 + 0.1 * rng.standard_normal(channels)).astype(np.float32)
    beta = rng.standard_normal(channels).astype(np.float32)
    y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
    exact = exact_batch_norm(x, gamma, beta, dy, axis)
    for actual, wanted in zip((y, dx, dgamma, dbeta), exact[:4], strict=True):
        assert actual.dtype == np.float32
        assert_close(actual, wanted)
    assert_close(cache.mean, exact[4], scale=abs(mean) + std)
    assert_close(cache.var, exact[5])
    again = fastbn.batch_norm_inference(x, cache.mean, cache.var, gamma, beta, axis=axis)
    assert_close(again, exact[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
def test_float64_keeps_its_digits_at_a_large_mean(variant, rng, layout, mean, std):
    shape, axis = LAYOUTS[layout]
    channels = shape[axis]
    x, dy = mean + std * rng.standard_normal(shape), rng.standard_normal(shape)
    gamma, beta = rng.standard_normal((2, channels))
    y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
    exact = exact_batch_norm(x, gamma, beta, dy, axis)
    # The mean itself has a rounding error of mean * 2^-53, however it is carried further.
    lost = 1 + abs(mean) / std / 2**12
    for actual, wanted in zip((y, dx, dgamma, dbeta), exact[:4], strict=True):
        assert_close(actual, wanted, scale=np.abs(wanted).max() * lost)


def exact_moments(values):
    """Return mean and variance of floats as Decimal numbers of 60 digits: all sums are integers."""
    mantissas, exponents = np.frexp(values)
    low = int(exponents.min())
    shifts = (exponents - low).tolist()
    integers = np.ldexp(mantissas, 53).astype(np.int64).tolist()
    integers = [m << s for m, s in zip(integers, shifts, strict=True)]
    n, total = len(integers), sum(integers)
    step = Decimal(2) ** (low - 53)
    spread = Decimal(n * sum(i * i for i in integers) - total * total)
    return Decimal(total) / n * step, spread / (n * n) * step * step


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1000, 33), 1), ((300, 70), 1), ((40, 700), 1), ((3000, 3, 2), 1), ((8, 3, 28, 28), 1),
     ((1, 2, 9000), 1), ((40, 4, 7, 7), 1), ((20, 500), 0)],
)  # fmt: skip
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (3, 1), (1e4, 1), (1e6, 1e-2), (0, 1e-100)])
def test_float64_is_exact_to_four_eps(rng, shape, axis, mean, std):
    # A third of the channels begins with an outlier, a third has a trend.
    channels, eps = shape[axis], np.finfo(float).eps
    x = rng.standard_normal(shape)
    by_channel = np.moveaxis(x, axis, 0)
    by_channel[::3].reshape(-1)[:1] = 4
    by_channel[1::3] += np.linspace(-9, 9, x.size // channels).reshape(by_channel.shape[1:])
    x = mean + std * x
    gamma, beta = rng.standard_normal((2, channels))
    y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis, eps=0)
    by_channel, results = (np.moveaxis(a, axis, 0).reshape(channels, -1) for a in (x, y))
    with localcontext() as context:
        context.prec = 60
        for c in range(min(channels, 36)):
            middle, var = exact_moments(by_channel[c])
            assert abs(Decimal(cache.var[c]) / var - 1) <= 4 * Decimal(eps)
            scale, shift = Decimal(gamma[c]) / var.sqrt(), Decimal(beta[c])
            largest = Decimal(np.abs(results[c]).max())
            for value, result in list(zip(by_channel[c], results[c], strict=True))[:200]:
                exact = (Decimal(value) - middle) * scale + shift
                assert abs(Decimal(result) - exact) <= 4 * Decimal(eps) * largest


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float64], ids=str)
@pytest.mark.parametrize("shape", [(64, 4, 6, 6), (500, 40)])
def test_leaky_gradients_that_cancel_keep_their_digits(variant, rng, shape, dtype):
    # All is below 0, and dy is almost constant: 0.01 dy is no float, and its digits count.
    x = rng.standard_normal(shape).astype(dtype)
    dy = (100 + rng.standard_normal(shape)).astype(dtype)
    beta = np.full(shape[1], -20.0)
    y, cache = fastbn.batch_norm(x, None, beta, activation="leaky_relu", residual=x)
    assert (y.astype(float) < 0).all()
    dx, dgamma, dbeta, dresidual = fastbn.batch_norm_backward(dy, cache)
    sloped = dy.astype(np.longdouble) * 0.01
    _, *exact, _, _ = exact_batch_norm(x, np.ones(shape[1]), beta, sloped, 1)
    for actual, wanted in zip((dx, dgamma, dbeta, dresidual), (*exact, sloped), strict=True):
        assert_close(actual, wanted)


def test_a_large_constant_in_the_gradient_costs_no_digits(variant, rng):
    x = rng.standard_normal((64, 4, 6, 6)).astype(np.float32) + np.float32(1e3)
    dy = rng.standard_normal(x.shape).astype(np.float32) + np.float32(1e4)
    _, cache = fastbn.batch_norm(x)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
    _, *exact, _, _ = exact_batch_norm(x, np.ones(4), np.zeros(4), dy, 1)
    for actual, wanted in zip((dx, dgamma, dbeta), exact, strict=True):
        assert_close(actual, wanted)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_many_channels_need_little_scratch_memory():
    code = r"""
import re, numpy as np, fastbn
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
x = np.ones((400_000, 16), np.float32)
out = x.copy()
fastbn.batch_norm(x[:100], axis=0)
before = peak()
_, cache = fastbn.batch_norm(x, axis=0, out=out)
statistics = 5 * 8 * 400_000  # mean in two parts, var, gamma, beta: what the cache holds
print((peak() - before - statistics) / x.nbytes)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.25


def test_an_outlier_in_first_place_costs_no_digits(variant, rng):
    # The first value of a block is the shift of its sums: the worst one is far from all others.
    for shape in [(4, 3, 50, 50), (500, 3), (400, 80)]:
        x = (1e4 + rng.standard_normal(shape)).astype(np.float32)
        x[0, 0] = 0
        x[0, 1].flat[0] = 0
        y, cache = fastbn.batch_norm(x)
        exact = exact_batch_norm(x, np.ones(shape[1]), np.zeros(shape[1]), x, 1)
        assert_close(y, exact[0])
        # Cancellation by the length of a block is allowed here, far below what float32 can tell.
        np.testing.assert_allclose(cache.var, exact[5], rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_channel_has_variance_zero(variant, dtype):
    for shape in [(6, 2, 5, 5), (6, 2), (100, 70)]:
        y, cache = fastbn.batch_norm(np.full(shape, 1e30, dtype), None, np.full(shape[1], 3.0))
        np.testing.assert_array_equal(cache.var, 0)
        np.testing.assert_array_equal(cache.mean, np.float64(dtype(1e30)))
        np.testing.assert_array_equal(y, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_channel(variant, rng, layout, bad):
    shape, axis = LAYOUTS[layout]
    clean = rng.standard_normal(shape).astype(np.float32)
    dirty = clean.copy()
    np.moveaxis(dirty, axis, 0)[1].flat[7] = bad
    others = np.arange(shape[axis]) != 1
    results = []
    for x in (clean, dirty):
        y, cache = fastbn.batch_norm(x, axis=axis)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(clean, cache)
        results.append(
            [np.moveaxis(y, axis, 0), np.moveaxis(dx, axis, 0), dgamma, cache.mean, cache.var]
        )
        np.testing.assert_array_equal(np.isfinite(dbeta), True)
    for wanted, actual in zip(*results, strict=True):
        np.testing.assert_array_equal(actual[others], wanted[others])
        assert not np.isfinite(actual[1]).any()


@pytest.mark.skipif(len(KERNELS) < 2, reason="this machine runs one kernel variant only")
@settings(max_examples=150, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 10_000)),
        st.tuples(st.integers(1, 5_000), st.integers(1, 5), st.integers(1, 3)),
        st.tuples(st.integers(1, 200), st.integers(1, 200), st.just(1)),
    ),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_variants_give_the_same_bits(shape, dtype, mean, seed):
    rng = np.random.default_rng(seed)
    x = (mean + rng.standard_normal(shape)).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[1]))
    results = {}
    try:
        for isa, kernels in KERNELS.items():
            functional.use_kernels(kernels)
            y, cache = fastbn.batch_norm(x, gamma, beta)
            gradients = fastbn.batch_norm_backward(dy, cache)
            inferred = fastbn.batch_norm_inference(x, cache.mean, cache.var, gamma, beta)
            fused, cache = fastbn.batch_norm(x, gamma, beta, activation="relu", residual=dy)
            more = [fused, *fastbn.batch_norm_backward(dy, cache)]
            arrays = [y, cache.mean, cache.var, *gradients, inferred, *more]
            results[isa] = b"".join(array.tobytes() for array in arrays)
    finally:
        functional.use_kernels(variants.kernels)
    assert len(set(results.values())) == 1, f"{list(results)} differ"
