"""Masks: only the valid positions count, and the others are zero."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_close

import fastbn
from fastbn import functional, reference

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
    for out in (np.empty_like(x), x.copy(), np.asfortranarray(x)):
        source = out if out.flags.c_contiguous else x
        source[...] = x
        y, cache = fastbn.batch_norm(source, gamma, beta, mask=mask, out=out)
        assert y is out
        np.testing.assert_array_equal(y, wanted)
        keep = mask.copy()
        mask[...] = False
        dx, *_ = fastbn.batch_norm_backward(dy, cache, out=out)
        mask[...] = keep
        assert dx is out
        np.testing.assert_array_equal(dx, wanted_dx)


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
