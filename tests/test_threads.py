"""The same bits and the same exactness at every number of threads, in every kernel variant."""

from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, ENOUGH, KERNELS, assert_close, exact_batch_norm

import fastbn
from fastbn import functional
from fastbn.kernels import variants

TARGETS = ["fresh", "in place", "misaligned"]


def arrays(shape, dtype, seed):
    """Return x, dy, gamma and beta; in half of the channels, about, mean / std is 1e4."""
    rng = np.random.default_rng(seed)
    means = rng.choice(np.float32([0, 1e4]), (1, shape[1], 1))
    x = (means + rng.standard_normal(shape, np.float32)).astype(dtype)
    dy = rng.standard_normal(shape, np.float32).astype(dtype)
    return x, dy, *rng.standard_normal((2, shape[1]))


def out_for(array, target):
    """Return an array that holds the same values, and where the result shall go."""
    if target == "fresh":
        return array, None
    if target == "in place":
        array = array.copy()
        return array, array
    return array, np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)


def bits(x, dy, gamma, beta, target="fresh"):
    """Return the bytes of everything that is computed of x and dy."""
    _, cache = fastbn.batch_norm(x, gamma, beta)  # in place there is nothing to go back through
    source, out = out_for(x, target)
    results = [fastbn.batch_norm(source, gamma, beta, out=out)[0], cache.mean, cache.var]
    source, out = out_for(dy, target)
    results += fastbn.batch_norm_backward(source, cache, out=out)
    source, out = out_for(x, target)
    moments = cache.mean, cache.var
    results += [fastbn.batch_norm_inference(source, *moments, gamma, beta, out=out)]
    _, cache = functional.inference_with_cache(x, *moments, gamma, beta, 1, 1e-5)
    results += fastbn.batch_norm_backward(dy, cache)
    source, out = out_for(x, target)
    y, cache = fastbn.batch_norm(x, gamma, beta, activation="leaky_relu", residual=dy)
    results += [y, *fastbn.batch_norm_backward(dy, cache)]
    results += [fastbn.batch_norm(source, gamma, beta, activation="relu", out=out)[0]]
    return [array.tobytes() for array in results]


def assert_same_bits(numbers, *arguments):
    before = fastbn.get_num_threads()
    wanted = None
    try:
        for isa, kernels in KERNELS.items():
            functional.use_kernels(kernels)
            for n in numbers:
                fastbn.set_num_threads(n)
                actual = bits(*arguments)
                wanted = wanted or actual
                differ = [i for i, a in enumerate(actual) if a != wanted[i]]
                assert not differ, f"results {differ} differ: {isa}, {n} threads"
    finally:
        functional.use_kernels(variants.kernels)
        fastbn.set_num_threads(before)


# (outer, channels, inner); what is None is made as large as it takes to use several threads.
shapes = st.one_of(
    st.tuples(st.none(), st.integers(64, 600), st.integers(16, 200)),  # short runs
    st.tuples(st.integers(1, 8), st.integers(64, 400), st.none()),  # a long run in each channel
    st.tuples(st.none(), st.integers(1, 3), st.integers(200, 30_000)),
    st.tuples(st.integers(1, 40), st.integers(1, 3), st.none()),
    st.tuples(st.just(1), st.none(), st.integers(16, 5_000)),
    st.tuples(st.none(), st.integers(1, 8), st.integers(1, 15)),  # rows, folded
    st.tuples(st.none(), st.integers(9, 1_000), st.integers(1, 15)),
    st.tuples(st.none(), st.integers(4_097, 20_000), st.integers(1, 3)),  # wider than a panel
)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    more=st.floats(1, 2),
    target=st.sampled_from(TARGETS),
    seed=st.integers(0, 2**32 - 1),
)
def test_threads_and_variants_change_no_bit(shape, dtype, more, target, seed):
    known = prod(n for n in shape if n)
    free = ceil(more * (ENOUGH / 2 / dtype.itemsize + 1) / known)
    shape = tuple(n or free for n in shape)
    assert_same_bits([1, 2, 3, 7], *arrays(shape, dtype, seed), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "inner"), [(100, 1024), (130, 50), (2, 40_000), (48, 1), (3, 1), (5_000, 1)]
)
def test_threads_change_no_bit_of_what_is_written_past_the_cache(channels, inner, dtype):
    # 0.3 of a last-level cache of 32 MB; on a machine with more these are merely large.
    outer = ceil(10.5e6 / dtype.itemsize / channels / inner)
    target = "fresh" if dtype in (np.float32, np.float16) else "misaligned"
    assert_same_bits([1, 3], *arrays((outer, channels, inner), dtype, 7), target)


LAYOUTS = {
    "NCHW": (40, 64, 400),
    "NCHW, short runs": (60, 500, 49),
    "NCHW, 3 channels": (8, 3, 50_000),
    "NCHW, one image": (1, 16, 70_000),
    "NHWC": (15_000, 70, 1),
    "NHWC, 3 channels": (400_000, 3, 1),
    "NC, wider than a panel": (120, 9_001, 1),
    "(n_h, m)": (1, 2_000, 500),
}


@pytest.mark.parametrize("threads", [3], indirect=True)  # others give the same bits
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (1e6, 1e2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_of_large_batches_is_at_most_two_eps(threads, rng, layout, mean, std):
    shape = LAYOUTS[layout]
    assert prod(shape) * 8 > ENOUGH
    x = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    gamma, beta = rng.standard_normal((2, shape[1])).astype(np.float32)
    y, cache = fastbn.batch_norm(x, gamma, beta)
    gradients = fastbn.batch_norm_backward(dy, cache)
    exact = exact_batch_norm(x, gamma, beta, dy, 1)
    for actual, wanted in zip((y, *gradients), exact[:4], strict=True):
        assert_close(actual, wanted)
    assert_close(fastbn.batch_norm_inference(x, cache.mean, cache.var, gamma, beta), exact[0])


def test_nan_stays_in_its_channel_at_every_number_of_threads(threads, rng):
    for shape in [(40, 64, 400), (60, 500, 49), (8, 3, 50_000), (15_000, 70, 1), (120, 9_001, 1)]:
        x = rng.standard_normal(shape, np.float32)
        clean, _ = fastbn.batch_norm(x)
        x[-1, 1, -1] = np.nan
        dirty, cache = fastbn.batch_norm(x)
        dx, *_ = fastbn.batch_norm_backward(x, cache)
        others = np.arange(shape[1]) != 1
        np.testing.assert_array_equal(dirty[:, others], clean[:, others])
        assert np.isfinite(dx[:, others]).all()
        assert np.isnan(dirty[:, 1]).all()
        assert np.isnan(dx[:, 1]).all()
