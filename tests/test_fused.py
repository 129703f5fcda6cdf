"""The activation and the residual that are fused with batch norm, and their gradients."""

import re
import tracemalloc

import numpy as np
import pytest
from support import DTYPES, MEANS_AND_STDS, assert_close

import fastbn
from fastbn import functional, reference

LAYOUTS = {
    "NCHW": ((8, 5, 20, 20), 1),
    "NCHW, short runs": ((9, 40, 7, 7), 1),
    "NCHW, tiny": ((7, 5, 2, 2), 1),
    "NHWC": ((5, 9, 9, 24), -1),
    "NHWC, 3 channels": ((5, 9, 9, 3), -1),
    "NC": ((64, 70), 1),
    "NC, wider than a panel": ((6, 4_500), 1),
    "(n_h, m)": ((20, 500), 0),
}
FUSIONS = [
    ("relu", False), ("relu", True), ("leaky_relu", False), ("leaky_relu", True), (None, True),
]  # fmt: skip


def arrays(rng, shape, axis, dtype, mean=0, std=1):
    x = (mean + std * rng.standard_normal(shape)).astype(dtype)
    residual, dy = rng.standard_normal((2, *shape)).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[axis])).astype(np.promote_types(dtype, "f4"))
    return x, gamma, beta, residual, dy


def assert_agrees(x, gamma, beta, residual, dy, axis, activation):
    y, cache = fastbn.batch_norm(
        x, gamma, beta, axis=axis, activation=activation, residual=residual
    )
    wide = [None if a is None else a.astype(np.float64) for a in (x, gamma, beta, residual)]
    wanted, exact = reference.batch_norm(
        *wide[:3], axis=axis, activation=activation, residual=wide[3]
    )
    # The residual may cancel what it is added to: eps of what is added.
    terms = wanted if residual is None else reference.batch_norm(*wide[:3], axis=axis)[0]
    assert y.dtype == x.dtype
    assert_close(y, wanted, scale=max(np.abs(wanted).max(), np.abs(terms).max()))
    gradients = fastbn.batch_norm_backward(dy, cache)
    assert len(gradients) == (3 if residual is None else 4)
    # Where rounding alone decides on which side of 0 a value is, ours counts.
    if activation:
        above = y > 0
        assert (above == (wanted > 0))[np.abs(wanted) > 1e-2].all()
        exact = exact._replace(slope=np.where(above, 1.0, reference.SLOPES[activation]))
    for actual, right in zip(
        gradients, reference.batch_norm_backward(dy.astype(np.float64), exact), strict=True
    ):
        assert_close(actual, right)
    moments = cache.mean, cache.var
    options = {"axis": axis, "activation": activation, "residual": residual}
    again = fastbn.batch_norm_inference(x, *moments, gamma, beta, **options)
    assert_close(again, wanted, scale=max(np.abs(wanted).max(), np.abs(terms).max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "residual"), FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_the_reference(variant, rng, layout, activation, residual, dtype):
    shape, axis = LAYOUTS[layout]
    x, gamma, beta, addend, dy = arrays(rng, shape, axis, dtype)
    assert_agrees(x, gamma, beta, addend if residual else None, dy, axis, activation)


@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_at_most_two_eps(variant, rng, layout, mean, std):
    shape, axis = LAYOUTS[layout]
    x, gamma, beta, addend, dy = arrays(rng, shape, axis, np.float32, mean, std)
    assert_agrees(x, gamma, beta, addend, dy, axis, "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_cancel_behind_leaky_relu_keep_their_digits(variant, rng, layout):
    shape, axis = LAYOUTS[layout]
    x, gamma, beta, _, noise = arrays(rng, shape, axis, np.float32)
    beta -= 100  # all values are below 0: the gradient there is 0.01 dy, which hardly varies
    dy = (1 + noise / 1024).astype(np.float32)
    _, cache = fastbn.batch_norm(x, gamma, beta, axis=axis, activation="leaky_relu")
    _, exact = reference.batch_norm(
        *(a.astype(np.float64) for a in (x, gamma, beta)), axis=axis, activation="leaky_relu"
    )
    _, dgamma, dbeta = fastbn.batch_norm_backward(dy, cache)
    _, dgamma_exact, dbeta_exact = reference.batch_norm_backward(dy.astype(np.float64), exact)
    assert_close(dgamma, dgamma_exact)
    assert_close(dbeta, dbeta_exact)


@pytest.mark.parametrize(("activation", "residual"), FUSIONS)
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4, 4), 1), ((2, 8, 8, 3), -1)])
def test_gradients_agree_with_finite_differences(rng, shape, axis, activation, residual):
    x, gamma, beta, addend, weight = arrays(rng, shape, axis, np.float64)
    options = {"axis": axis, "activation": activation, "residual": addend if residual else None}

    def loss():
        return (fastbn.batch_norm(x, gamma, beta, **options)[0] * weight).sum()

    _, cache = fastbn.batch_norm(x.copy(), gamma, beta, **options)
    for array, gradient in zip(
        (x, gamma, beta, addend), fastbn.batch_norm_backward(weight, cache), strict=False
    ):
        for i in np.ndindex(array.shape):
            value, losses = array[i], []
            for array[i] in (value + 1e-6, value - 1e-6):
                losses.append(loss())
            array[i] = value
            numeric = (losses[0] - losses[1]) / 2e-6
            assert gradient[i] == pytest.approx(numeric, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_gradients_at_constant_statistics(variant, rng, activation):
    for shape, axis in LAYOUTS.values():
        x, gamma, beta, addend, dy = arrays(rng, shape, axis, np.float32)
        mean, var = rng.standard_normal(shape[axis]), 0.5 + rng.random(shape[axis])
        y, cache = functional.inference_with_cache(
            x, mean, var, gamma, beta, axis, 1e-5, activation, addend
        )
        dx, dgamma, dbeta, dresidual = fastbn.batch_norm_backward(dy, cache)
        slope = np.where(y > 0, 1, reference.SLOPES[activation])
        g = (dy.astype(np.float64) * slope).astype(np.float32)  # rounded once
        wide = [1] * len(shape)
        wide[axis] = -1
        others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        rstd = (1 / np.sqrt(var + 1e-5)).reshape(wide)
        z_hat = (x - mean.reshape(wide)) * rstd
        np.testing.assert_array_equal(dresidual, g)
        assert_close(dx, g.astype(float) * gamma.reshape(wide) * rstd)
        assert_close(dgamma, (g.astype(float) * z_hat).sum(others))
        assert_close(dbeta, g.sum(others, dtype=float))


def test_what_cannot_be_compared_or_is_infinite_is_kept_or_cut(variant):
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3.0, -3.0] * 3)
    for dtype in (np.float32, np.float64):
        x = special.astype(dtype)[:, None]
        for activation, slope in (("relu", 0), ("leaky_relu", dtype(0.01))):
            y = fastbn.batch_norm_inference(x, [0], [1], eps=0, activation=activation)
            with np.errstate(invalid="ignore", under="ignore"):
                wanted = np.where(x <= 0, x * slope if slope else 0, x)
            np.testing.assert_array_equal(y, wanted)


def test_relu_of_a_channel_with_nan_is_nan_and_of_others_is_not(variant, rng):
    for shape, axis in LAYOUTS.values():
        x, gamma, beta, addend, dy = arrays(rng, shape, axis, np.float32)
        addend.flat[0] = np.nan
        channel = 0
        y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis, activation="relu", residual=addend)
        dx, *_ = fastbn.batch_norm_backward(dy, cache)
        assert np.isnan(y.flat[0])
        assert np.isfinite(np.delete(y, channel, axis)).all()
        assert np.isfinite(dx).all()  # the residual has no part in it, NaN lets dy through


def test_memory_of_any_kind_is_read_and_written_right(rng):
    x, gamma, beta, addend, dy = arrays(rng, (4, 5, 6, 7), 1, np.float32)
    options = {"activation": "relu"}
    wanted, cache = fastbn.batch_norm(x, gamma, beta, residual=addend, **options)
    gradients = fastbn.batch_norm_backward(dy, cache)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(addend, 1, -1)), -1, 1)
    swapped = addend.astype(">f4")
    for residual in (last, swapped, np.asfortranarray(addend), addend.tolist()):
        y, cache = fastbn.batch_norm(x, gamma, beta, residual=residual, **options)
        np.testing.assert_array_equal(y, wanted)
        for actual, right in zip(
            fastbn.batch_norm_backward(dy[:, ::-1][:, ::-1], cache), gradients, strict=True
        ):
            np.testing.assert_array_equal(actual, right)
    # y may take the place of the residual, lie beside it, or overlap it; of x too.
    for name in ("residual", "x", "overlap"):
        buffer = np.empty(addend.size + 3, np.float32)
        where = buffer[: addend.size].reshape(addend.shape)
        where[...] = x if name == "x" else addend
        out = buffer[3:].reshape(addend.shape) if name == "overlap" else where
        given = {"x": x, "residual": addend, "x" if name == "x" else "residual": where}
        y, cache = fastbn.batch_norm(
            given["x"], gamma, beta, residual=given["residual"], out=out, **options
        )
        assert y is out
        np.testing.assert_array_equal(y, wanted)
        if name != "x":
            dx, *_ = fastbn.batch_norm_backward(dy, cache)
            np.testing.assert_array_equal(dx, gradients[0])
    target = dy.copy()
    _, cache = fastbn.batch_norm(x, gamma, beta, residual=addend, **options)
    dx, *_, dresidual = fastbn.batch_norm_backward(target, cache, out=target)
    assert dx is target
    np.testing.assert_array_equal(dx, gradients[0])
    np.testing.assert_array_equal(dresidual, gradients[3])


def test_what_happens_to_y_and_the_residual_later_changes_no_gradient(rng):
    x, gamma, beta, addend, dy = arrays(rng, (16, 40, 7, 7), 1, np.float32)
    y, cache = fastbn.batch_norm(x, gamma, beta, activation="relu", residual=addend)
    wanted = fastbn.batch_norm_backward(dy, cache)
    y[...] = addend[...] = -1
    for actual, right in zip(fastbn.batch_norm_backward(dy, cache), wanted, strict=True):
        np.testing.assert_array_equal(actual, right)
    wanted[3][...] = 7  # dresidual is nobody else's
    assert not (dy == 7).any()


def test_a_cache_holds_a_bit_for_each_value(rng):
    x = rng.standard_normal((64, 32, 28, 28)).astype(np.float32)
    residual = x.copy()
    kept = fastbn.set_recycling(0)  # or y would still be there
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        y, cache = fastbn.batch_norm(x, activation="relu", residual=residual)
        del y
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        fastbn.set_recycling(kept)
    assert x.size / 8 <= after - before <= x.size / 8 + 10_000
    assert cache.mean.shape == (32,)


X = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError,
         "activation: expected None, 'relu' or 'leaky_relu', got 'gelu'"),
        ({"activation": np.array(["relu", "x"])}, ValueError, "activation: expected None, 'relu'"),
        ({"activation": 1}, ValueError, "activation: expected None, 'relu' or 'leaky_relu', got 1"),
        ({"residual": X.T}, ValueError, "residual: expected shape (4, 3), as x has, got (3, 4)"),
        ({"residual": 1.0}, ValueError, "residual: expected shape (4, 3), as x has, got ()"),
        ({"residual": X.astype("f4")}, TypeError,
         "residual: expected dtype float64, as x has, got float32"),
        ({"residual": X + 1j}, TypeError,
         "residual: expected float16, bfloat16, float32 or float64, got complex128"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", ["batch_norm", "batch_norm_inference", "instance_norm"])
def test_bad_arguments_are_named_and_nothing_is_written(function, options, error, message):
    target = np.full((4, 3), 7.0)
    statistics = ([0, 0, 0], [1, 1, 1]) if function == "batch_norm_inference" else ()
    with pytest.raises(error, match=re.escape(message)):
        getattr(fastbn, function)(X, *statistics, out=target, **options)
    np.testing.assert_array_equal(target, 7)
