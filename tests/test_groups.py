"""Groups of examples with statistics of their own: instance norm and virtual batches."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, KERNELS, MEANS_AND_STDS, assert_close

import fastbn
from fastbn import functional, reference
from fastbn.kernels import variants

LAYOUTS = {
    "NCHW": ((6, 5, 20, 20), 1),
    "NCHW, short runs": ((7, 40, 7, 7), 1),
    "NHWC": ((5, 9, 9, 24), -1),
    "NHWC, 3 channels": ((4, 9, 9, 3), -1),
    "NCL": ((5, 3, 40), 1),
    "one channel": ((5, 1, 40), 1),
    "one example": ((1, 5, 8, 8), 1),
    "(n_h, m)": ((20, 50), 0),
    "(c, h, w, m)": ((3, 5, 4, 9), 0),
}


def arrays(rng, shape, axis, dtype=np.float32, mean=0, std=1):
    x = (mean + std * rng.standard_normal(shape)).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[axis])).astype(np.promote_types(dtype, "f4"))
    return x, gamma, beta, dy


def run(module, x, gamma, beta, dy, axis, size, **options):
    """Return y, mean, var and gradients: of instance norm, or with virtual batches of a size."""
    if size == "instance":
        y, cache = module.instance_norm(x, gamma, beta, axis=axis, **options)
        return y, cache.mean, cache.var, *module.instance_norm_backward(dy, cache)
    y, cache = module.batch_norm(x, gamma, beta, axis=axis, virtual_batch_size=size, **options)
    return y, cache.mean, cache.var, *module.batch_norm_backward(dy, cache)


def wide(*arrays):
    return [a.astype(np.float64) for a in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["instance", 2, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_the_reference(variant, rng, layout, size, dtype):
    shape, axis = LAYOUTS[layout]
    x, gamma, beta, dy = arrays(rng, shape, axis, dtype)
    if size == "instance" and layout == "(n_h, m)":
        pytest.skip("an example of this layout has one position")
    actual = run(fastbn, x, gamma, beta, dy, axis, size)
    wanted = run(reference, *wide(x, gamma, beta, dy), axis, size)
    # Two values in a group: dx is nothing but cancellation, so eps of what cancels.
    cancelled = np.abs(gamma).max() * np.abs(dy.astype(float)).max() / np.sqrt(wanted[2].min())
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        statistics = i in (1, 2)
        assert_close(a, w, np.float64 if statistics else None, 1 if statistics else
                     max(np.abs(w).max(), cancelled if i == 3 else 0))  # fmt: skip


@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
@pytest.mark.parametrize("layout", ["NCHW", "NCHW, short runs", "NHWC", "NHWC, 3 channels"])
def test_error_is_at_most_two_eps(variant, rng, layout, mean, std):
    shape, axis = LAYOUTS[layout]
    x, gamma, beta, dy = arrays(rng, shape, axis, mean=mean, std=std)
    for size in ("instance", 2):
        y, _, _, *gradients = run(fastbn, x, gamma, beta, dy, axis, size)
        exact = run(reference, *wide(x, gamma, beta, dy), axis, size)
        for a, w in zip((y, *gradients), (exact[0], *exact[3:]), strict=True):
            assert_close(a, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["NCHW", "NCHW, short runs", "NHWC", "NHWC, 3 channels", "NCL"])
def test_each_group_has_the_bits_that_it_has_alone(rng, layout, size, dtype):
    shape, axis = LAYOUTS[layout]
    x, gamma, beta, dy = arrays(rng, shape, axis, dtype)
    residual = dy[::-1].copy()
    options = {"activation": "relu"}
    y, cache = fastbn.batch_norm(
        x, gamma, beta, axis=axis, virtual_batch_size=size, residual=residual, **options
    )
    dx, *_, dresidual = fastbn.batch_norm_backward(dy, cache)
    for first in range(0, shape[0], size):
        part = slice(first, first + size)
        alone, own = fastbn.batch_norm(
            x[part], gamma, beta, axis=axis, residual=residual[part], **options
        )
        np.testing.assert_array_equal(y[part], alone)
        np.testing.assert_array_equal(cache.mean[first // size], own.mean)
        own_dx, *_, own_dresidual = fastbn.batch_norm_backward(dy[part], own)
        np.testing.assert_array_equal(dx[part], own_dx)
        np.testing.assert_array_equal(dresidual[part], own_dresidual)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 40), st.integers(1, 80), st.integers(1, 900)),
        st.tuples(st.integers(200, 900), st.integers(1, 40), st.integers(16, 60)),
        st.tuples(st.integers(2, 9), st.integers(1, 4), st.integers(50_000, 90_000)),
        st.tuples(st.integers(2_000, 9_000), st.integers(60, 300), st.just(1)),
    ),
    last=st.booleans(),
    size=st.integers(1, 12),
    activation=st.sampled_from([None, "relu"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_threads_and_variants_change_no_bit(shape, last, size, activation, dtype, seed):
    shape, axis = ((shape[0], shape[2], shape[1]), -1) if last else (shape, 1)
    x, gamma, beta, dy = arrays(np.random.default_rng(seed), shape, axis, dtype)
    before, results = fastbn.get_num_threads(), set()
    try:
        for kernels in KERNELS.values():
            functional.use_kernels(kernels)
            for threads in (1, 3):
                fastbn.set_num_threads(threads)
                everything = run(
                    fastbn, x, gamma, beta, dy, axis, size, activation=activation, residual=dy
                )
                results.add(b"".join(a.tobytes() for a in everything))
    finally:
        functional.use_kernels(variants.kernels)
        fastbn.set_num_threads(before)
    assert len(results) == 1


def test_moments_of_all_groups_together_are_those_of_the_minibatch(rng):
    x = (1e6 + rng.standard_normal((10, 3, 5, 5))).astype(np.float64)
    whole = fastbn.batch_moments(x)
    for size in (1, 3, 2**70):
        _, cache = fastbn.batch_norm(x, virtual_batch_size=size)
        assert cache.mean.shape == cache.var.shape == (-(-10 // size), 3)
        mean, var, count = cache.moments
        assert count == whole.count == 250
        np.testing.assert_allclose(mean, whole.mean, rtol=3e-16)
        np.testing.assert_allclose(var, whole.var, rtol=1e-14)


def test_memory_of_any_kind_is_read_and_written_right(rng):
    x, gamma, beta, dy = arrays(rng, (5, 6, 4, 7), 1)
    wanted = run(fastbn, x, gamma, beta, dy, 1, 2)
    for order in (np.asfortranarray, lambda a: a[:, ::-1][:, ::-1], lambda a: a.astype(">f4")):
        for actual, right in zip(
            run(fastbn, order(x), gamma, beta, order(dy), 1, 2), wanted, strict=True
        ):
            assert_close(actual, right.astype(float))
    last = [np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy)]
    for actual, right in zip(run(fastbn, last[0], gamma, beta, last[1], 1, 2), wanted, strict=True):
        assert_close(actual, right.astype(float))
    out = np.empty_like(last[0])
    y, cache = fastbn.batch_norm(x, gamma, beta, virtual_batch_size=2, out=out)
    assert y is out
    np.testing.assert_array_equal(y, wanted[0])
    dx, *_ = fastbn.batch_norm_backward(dy, cache, out=out)
    assert dx is out
    np.testing.assert_array_equal(dx, wanted[3])


def test_with_one_position_y_is_beta(rng):
    y, _ = fastbn.instance_norm(rng.standard_normal((4, 3)), None, [1, 2, 3])
    np.testing.assert_array_equal(y, np.tile([1.0, 2, 3], (4, 1)))


def test_nan_stays_in_its_channel_of_its_example(variant, rng):
    for shape, axis in [((4, 3, 5, 5), 1), ((4, 5, 5, 3), -1)]:
        x = rng.standard_normal(shape).astype(np.float32)
        x[1].flat[0] = np.nan
        y, cache = fastbn.instance_norm(x, axis=axis)
        bad = np.isnan(np.moveaxis(y, axis, 1)).all(axis=(2, 3))
        assert bad.sum() == np.isnan(cache.mean).sum() == 1
        assert bad[1, 0]
        assert np.isnan(y).sum() == 25


X = np.arange(12.0).reshape(2, 3, 2)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"virtual_batch_size": 0}, ValueError,
         "virtual_batch_size: expected None or an integer >= 1, got 0"),
        (X, {"virtual_batch_size": 1.5}, TypeError,
         "virtual_batch_size: expected an integer, got float"),
        (X, {"virtual_batch_size": 2, "axis": 3}, ValueError, "axis: expected an axis of x"),
        (X[0, :, 0], {"virtual_batch_size": 2, "axis": 0}, ValueError,
         "x: expected an axis of examples beside that of the channels, got shape (3,)"),
        (X[:0], {"virtual_batch_size": 2}, ValueError, "x: expected at least one value per"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(x, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastbn.batch_norm(x, **options)
