"""Masks: only the valid positions count, and the others are zero."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, KERNELS, assert_close

import fastbn
from fastbn import functional, reference
from fastbn.kernels import variants

LAYOUTS = {"NLC": ((6, 20, 5), -1), "NCL": ((6, 5, 20), 1), "NC": ((40, 5), 1),
           "NCHW": ((4, 3, 7, 7), 1), "(n_h, m)": ((5, 40), 0)}  # fmt: skip


def case(rng, layout, dtype=np.float32):
    shape, axis = LAYOUTS[layout]
    x, residual, dy = (2 + rng.standard_normal((3, *shape))).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[axis])).astype(np.promote_types(dtype, "f4"))
    mask = rng.random(np.delete(shape, axis)) < 0.6
    return x, gamma, beta, residual, dy, mask, axis


def rows(array, mask, axis):
    """Select the valid positions, one a row."""
    return np.ascontiguousarray(np.moveaxis(array, axis, -1)[mask])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_batch_norm_of_the_valid_positions(variant, rng, layout, dtype):
    x, gamma, beta, residual, dy, mask, axis = case(rng, layout, dtype)
    y, cache = fastbn.batch_norm(
        x, gamma, beta, axis=axis, mask=mask, activation="relu", residual=residual
    )
    dx, dgamma, dbeta, dresidual = fastbn.batch_norm_backward(dy, cache)
    selected = [rows(a, mask, axis) for a in (x, residual, dy)]
    wanted, exact = reference.batch_norm(
        *(a.astype(float) for a in (selected[0], gamma, beta)), activation="relu",
        residual=selected[1].astype(float),
    )  # fmt: skip
    exact = exact._replace(slope=np.where(rows(y, mask, axis) > 0, 1.0, 0.0))
    gradients = reference.batch_norm_backward(selected[2].astype(float), exact)
    terms = np.abs(wanted).max() + np.abs(selected[1]).max().astype(float)
    assert_close(rows(y, mask, axis), wanted, scale=terms)
    for actual, right in ((dx, gradients[0]), (dresidual, gradients[3])):
        assert_close(rows(actual, mask, axis), right)
    for zeros in (y, dx, dresidual):
        assert (rows(zeros, ~mask, axis) == 0).all()
    assert_close(dgamma, gradients[1])
    assert_close(dbeta, gradients[2])
    np.testing.assert_allclose(cache.mean, exact.mean, rtol=1e-12)
    assert cache.moments.count == mask.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_agrees(rng, layout):
    x, gamma, beta, residual, dy, mask, axis = case(rng, layout, np.float64)
    options = {"axis": axis, "mask": mask, "activation": "leaky_relu", "residual": residual}
    results = []
    for module in (fastbn, reference):
        y, cache = module.batch_norm(x, gamma, beta, **options)
        results.append((y, *module.batch_norm_backward(dy, cache)))
    for actual, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 2**32 - 1))
def test_values_at_masked_positions_change_nothing(layout, seed):
    rng = np.random.default_rng(seed)
    x, gamma, beta, _, dy, mask, axis = case(rng, layout)
    if not mask.any():
        return
    masked = np.broadcast_to(np.expand_dims(~mask, axis), x.shape)
    results = []
    for rubbish in (0, np.nan, 1e30):
        x[masked] = dy[masked] = rubbish
        y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis, mask=mask)
        results.append((y, *fastbn.batch_norm_backward(dy, cache)))
        _, cache = reference.batch_norm(x, gamma, beta, axis=axis, mask=mask)
        assert all(np.isfinite(a).all() for a in reference.batch_norm_backward(dy, cache))
    for others in results[1:]:
        for actual, wanted in zip(others, results[0], strict=True):
            np.testing.assert_array_equal(actual, wanted)


def test_without_masked_positions_nothing_changes(rng):
    for layout in LAYOUTS:
        x, gamma, beta, _, dy, mask, axis = case(rng, layout)
        for options in ({}, {"mask": np.ones_like(mask)}):
            y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis, **options)
            dx, *_ = fastbn.batch_norm_backward(dy, cache)
            if not options:
                wanted = y, dx
        np.testing.assert_allclose(y, wanted[0], atol=1e-6)
        np.testing.assert_allclose(dx, wanted[1], atol=1e-6)
        assert y.strides == wanted[0].strides


def test_out_memory_and_a_mask_changed_later(rng):
    x, gamma, beta, _, dy, mask, _ = case(rng, "NCHW")
    wanted, cache = fastbn.batch_norm(x, gamma, beta, mask=mask)
    wanted_dx, *_ = fastbn.batch_norm_backward(dy, cache)
    for out in (np.empty_like(x), np.asfortranarray(x)):
        y, cache = fastbn.batch_norm(x, gamma, beta, mask=mask, out=out)
        assert y is out
        np.testing.assert_array_equal(y, wanted)
        keep = mask.copy()
        mask[...] = False
        dx, *_ = fastbn.batch_norm_backward(dy, cache, out=out)
        mask[...] = keep
        assert dx is out
        np.testing.assert_array_equal(dx, wanted_dx)
    y, cache = fastbn.batch_norm(x, gamma, beta, mask=mask, out=x)
    assert y is x
    np.testing.assert_array_equal(y, wanted)
    with pytest.raises(ValueError, match="cache: x is needed for the gradients, but out= has"):
        fastbn.batch_norm_backward(dy, cache)


def gathered(array, mask, axis, last):
    """Return the valid positions alone: (positions, channels), or (channels, positions)."""
    selected = rows(array, mask, axis)
    return selected if last else np.ascontiguousarray(selected.T)


def some_mask(rng, shape):
    """Return the mask of padded sequences, or one without any order, with a valid position."""
    if rng.random() < 0.5:
        mask = rng.random(shape) < rng.random()
    else:
        lengths = rng.integers(0, shape[1] + 1, shape[0])
        mask = np.arange(shape[1]) < lengths[:, None]
    mask.flat[-1] = True
    return mask


@settings(max_examples=120, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 60), st.integers(2, 40), st.integers(16, 300)),
        st.tuples(st.integers(1, 8), st.integers(2, 9), st.integers(3000, 9000)),
        st.tuples(st.integers(1, 30), st.integers(2, 30), st.integers(1, 15)),
        st.tuples(st.integers(1, 9), st.integers(4090, 4200), st.integers(2, 9)),
    ),
    last=st.booleans(),
    size=st.one_of(st.none(), st.integers(1, 9)),
    activation=st.sampled_from([None, "relu", "leaky_relu"]),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3, 7]),
    isa=st.sampled_from(sorted(KERNELS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_has_the_bits_of_the_valid_positions_alone(
    shape, last, size, activation, residual, dtype, threads, isa, seed
):
    rng = np.random.default_rng(seed)
    axis = 1
    if last:
        shape, axis = (shape[0], shape[2], shape[1]), 2
    x, dy, added = (1 + rng.standard_normal((3, *shape))).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[axis]))
    mask = some_mask(rng, tuple(np.delete(shape, axis)))
    options = {"axis": axis, "activation": activation, "mask": mask, "virtual_batch_size": size}
    before = fastbn.get_num_threads()
    try:
        fastbn.set_num_threads(threads)
        functional.use_kernels(KERNELS[isa])
        y, cache = fastbn.batch_norm(
            x, gamma, beta, residual=added if residual else None, **options
        )
        dx, dgamma, dbeta, *dresidual = fastbn.batch_norm_backward(dy, cache)
    finally:
        functional.use_kernels(variants.kernels)
        fastbn.set_num_threads(before)
    assert y.strides == dx.strides == x.strides
    by_position = last or shape[2] < 16  # how x is walked
    size = size or shape[0]
    for group, first in enumerate(range(0, shape[0], size)):
        part = slice(first, first + size)
        valid = mask[part]
        for zeros in (y[part], dx[part]):
            assert (rows(zeros, ~valid, axis) == 0).all()
        statistics = np.atleast_2d(cache.mean)[group], np.atleast_2d(cache.var)[group]
        if valid.sum() < (1 if by_position else 16):  # few positions are walked as rows alone
            assert valid.any() or not np.any(statistics)
            continue
        alone = [gathered(a[part], valid, axis, by_position) for a in (x, dy, added)]
        own_y, own = fastbn.batch_norm(
            alone[0], gamma, beta, axis=1 if by_position else 0, activation=activation,
            residual=alone[2] if residual else None,
        )  # fmt: skip
        own_dx, *own_sums = fastbn.batch_norm_backward(alone[1], own)
        pairs = [(statistics[0], own.mean), (statistics[1], own.var)]
        if size >= shape[0]:
            pairs += zip((dgamma, dbeta), own_sums[:2], strict=True)
        results = zip((y, dx, *dresidual), (own_y, own_dx, *own_sums[2:]), strict=True)
        pairs += [(gathered(a[part], valid, axis, by_position), b) for a, b in results]
        for actual, wanted in pairs:
            assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_agrees_in_virtual_batches(rng, layout):
    x, gamma, beta, residual, dy, mask, axis = case(rng, layout, np.float64)
    if axis:
        mask[:2] = False  # a group without values: the zeros of y and no statistics
    options = {"axis": axis, "mask": mask, "virtual_batch_size": 2, "residual": residual}
    results = []
    for module in (fastbn, reference):
        y, cache = module.batch_norm(x, gamma, beta, **options)
        results.append((y, cache.mean, cache.var, *module.batch_norm_backward(dy, cache)))
    for actual, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-11)
    _, cache = fastbn.batch_norm(x, gamma, beta, **options)
    assert cache.moments.count == mask.sum()
    selected = np.moveaxis(x, axis, -1)[mask]
    np.testing.assert_allclose(cache.moments.mean, selected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cache.moments.var, selected.var(0), rtol=1e-12)


@pytest.mark.parametrize("shape", [(64, 300, 64), (64, 64, 300)])
def test_no_copy_of_x_is_made(rng, shape):
    axis = 2 if shape[2] == 64 else 1
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    out, mask = np.empty_like(x), np.arange(300) < rng.integers(100, 300, 64)[:, None]
    tracemalloc.start()
    try:
        _, cache = fastbn.batch_norm(x, axis=axis, mask=mask, out=out)
        fastbn.batch_norm_backward(dy, cache, out=out)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 20
    finally:
        tracemalloc.stop()


def test_statistics_given_and_everything_masked(rng):
    x, gamma, beta, _, dy, mask, _ = case(rng, "NLC")
    mean, var = np.ones(5), np.full(5, 4.0)
    y, cache = functional.inference_with_cache(
        x, mean, var, gamma, beta, -1, 1e-5, None, None, mask
    )
    whole = fastbn.batch_norm_inference(x, mean, var, gamma, beta, axis=-1)
    np.testing.assert_array_equal(y, np.where(mask[..., None], whole, 0))
    nothing = np.zeros_like(mask)
    y, cache = functional.inference_with_cache(
        x, mean, var, gamma, beta, -1, 1e-5, None, None, nothing
    )
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
    assert not y.any()
    assert not dx.any()
    np.testing.assert_array_equal((dgamma, dbeta), np.zeros((2, 5)))


X = np.arange(24.0).reshape(4, 3, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": np.ones((4, 2))}, TypeError, "mask: expected bool, got float64"),
        ({"mask": np.ones((4, 3), bool)}, ValueError,
         "mask: expected shape (4, 2), x's without axis 1, got (4, 3)"),
        ({"mask": np.zeros((4, 2), bool)}, ValueError,
         "mask: expected valid positions, got none in shape (4, 2)"),
        ({"mask": np.ones((4, 2), bool), "axis": 4}, ValueError, "axis: expected an axis of x"),
        ({"mask": np.ones((4, 2), bool), "axis": "c"}, TypeError, "axis: expected an integer"),
        ({"mask": np.ones((4, 2), bool), "residual": X[0]}, ValueError,
         "residual: expected shape (4, 3, 2), as x has, got (3, 2)"),
        ({"mask": np.ones((4, 2), bool), "activation": "tanh"}, ValueError, "activation: expected"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(options, error, message):
    target = np.full(X.shape, 7.0)
    with pytest.raises(error, match=re.escape(message)):
        fastbn.batch_norm(X, **options, out=target)
    np.testing.assert_array_equal(target, 7)


def test_bad_gradients_are_named_and_nothing_is_written():
    _, cache = fastbn.batch_norm(X, mask=np.ones((4, 2), bool))
    target = np.full(X.shape, 7.0)
    for dy, error, message in [
        (X[0], ValueError, "dy: expected shape (4, 3, 2), as x has, got (3, 2)"),
        (X.astype("f4"), TypeError, "dy: expected dtype float64, as x has, got float32"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            fastbn.batch_norm_backward(dy, cache, out=target)
    with pytest.raises(ValueError, match=re.escape("out: expected shape (4, 3, 2)")):
        fastbn.batch_norm_backward(X, cache, out=target[0])
    np.testing.assert_array_equal(target, 7)
