"""The functions against the reference, and everything that can be wrong with their arguments."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import assert_close

import fastbn
from fastbn import reference

DTYPES = [np.float32, np.float64]
SHAPES = [
    (7,),
    (6, 5),
    (4, 3, 9),
    (3, 4, 5, 6),
    (2, 3, 4, 2, 3),
    (2, 3, 20, 20),
    (1, 5, 40),
    (40, 2),
]


def each_axis():
    return [(shape, axis) for shape in SHAPES for axis in range(-1, len(shape))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), each_axis())
def test_agrees_with_the_reference(variant, rng, shape, axis, dtype):
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[axis])).astype(dtype)
    y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis)
    wanted, reference_cache = reference.batch_norm(x, gamma, beta, axis=axis)
    assert_close(y, wanted)
    assert_close(cache.mean, reference_cache.mean, np.float64, scale=1)
    assert_close(cache.var, reference_cache.var, np.float64, scale=1)
    gradients = fastbn.batch_norm_backward(dy, cache)
    # With one or two values per channel dx is nothing but cancellation: eps of what cancels.
    cancelled = np.abs(gamma).max() * np.abs(dy).max() / np.sqrt(cache.var.min() + 1e-5)
    for actual, wanted in zip(
        gradients, reference.batch_norm_backward(dy, reference_cache), strict=True
    ):
        assert actual.dtype == dtype
        assert_close(actual, wanted, scale=cancelled if x.size <= 2 * shape[axis] else None)
    mean, var = rng.standard_normal(shape[axis]), rng.random(shape[axis])
    assert_close(
        fastbn.batch_norm_inference(x, mean, var, gamma, beta, axis=axis),
        reference.batch_norm_inference(x, mean, var, gamma, beta, axis=axis),
    )


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4, 4), 1), ((2, 8, 8, 3), -1)])
def test_gradients_agree_with_finite_differences(variant, rng, shape, axis):
    x, weight = rng.standard_normal((2, *shape))
    gamma, beta = rng.standard_normal((2, shape[axis]))

    def loss():
        return (fastbn.batch_norm(x, gamma, beta, axis=axis)[0] * weight).sum()

    _, cache = fastbn.batch_norm(x.copy(), gamma, beta, axis=axis)
    step = 1e-6
    for array, gradient in zip(
        (x, gamma, beta), fastbn.batch_norm_backward(weight, cache), strict=True
    ):
        numeric = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            value = array[i]
            array[i] = value + step
            above = loss()
            array[i] = value - step
            numeric[i] = (above - loss()) / (2 * step)
            array[i] = value
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=9),
        elements=st.floats(-1e3, 1e3, width=16),
    ),
    data=st.data(),
)
def test_output_has_the_mean_and_variance_that_gamma_and_beta_say(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    channels = x.shape[axis]
    gamma, beta = np.arange(1.0, channels + 1), np.arange(channels) - 2.0
    y, cache = fastbn.batch_norm(x, gamma, beta, axis=axis)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    np.testing.assert_allclose(y.mean(others, dtype=float), beta, atol=1e-4 * channels)
    wanted = gamma * np.sqrt(cache.var / (cache.var + 1e-5))
    np.testing.assert_allclose(y.std(others, dtype=float), wanted, rtol=1e-3, atol=1e-4 * channels)


MEMORY = {
    "C order": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[:, :, ::-1])[:, :, ::-1],
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "misaligned": lambda a: (
        np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)
    ),
}


def read_only(array):
    array = array.view()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dy_memory", MEMORY)
@pytest.mark.parametrize("x_memory", MEMORY)
def test_any_memory_is_read_right(rng, x_memory, dy_memory, dtype):
    plain_x, plain_dy = rng.standard_normal((2, 4, 5, 6, 7)).astype(dtype)
    x, dy = MEMORY[x_memory](plain_x), MEMORY[dy_memory](plain_dy)
    np.testing.assert_array_equal(x, plain_x)
    x, dy = read_only(x), read_only(dy)
    wanted, reference_cache = reference.batch_norm(plain_x)
    y, cache = fastbn.batch_norm(x)
    assert y.dtype == dtype
    assert_close(y, wanted)
    gradients = fastbn.batch_norm_backward(dy, cache)
    for actual, exact in zip(
        gradients, reference.batch_norm_backward(plain_dy, reference_cache), strict=True
    ):
        assert_close(actual, exact)
    mean, var = cache.mean, cache.var
    assert_close(fastbn.batch_norm_inference(x, mean, var), wanted)
    if x_memory in ("C order", "Fortran order", "channels last"):
        assert y.strides == gradients[0].strides == x.strides


@pytest.mark.parametrize(
    "out_memory", [m for m in MEMORY if m not in ("misaligned", "every other")]
)
@pytest.mark.parametrize("x_memory", MEMORY)
def test_out_is_filled_and_returned_whatever_its_memory(rng, x_memory, out_memory):
    plain_x, plain_dy = rng.standard_normal((2, 4, 5, 6, 7)).astype(np.float32)
    x = MEMORY[x_memory](plain_x)
    wanted, cache = fastbn.batch_norm(x)
    out = MEMORY[out_memory](np.full(x.shape, np.nan, np.float32))
    y, cache = fastbn.batch_norm(x, out=out)
    assert y is out
    np.testing.assert_array_equal(out, wanted)
    out[...] = np.nan
    assert fastbn.batch_norm_inference(x, cache.mean, cache.var, out=out) is out
    assert_close(out.astype(np.float32), wanted)
    wanted, *_ = fastbn.batch_norm_backward(plain_dy, cache)
    out[...] = np.nan
    dx, *_ = fastbn.batch_norm_backward(plain_dy, cache, out=out)
    assert dx is out
    np.testing.assert_array_equal(out, wanted)


def overlaps():
    """Pairs of views on one buffer: the same elements, shifted, another order, interleaved."""
    return {
        "same": lambda b: (b[:600].reshape(4, 5, 30), b[:600].reshape(4, 5, 30)),
        "shifted by one": lambda b: (b[1:601].reshape(4, 5, 30), b[:600].reshape(4, 5, 30)),
        "shifted back": lambda b: (b[:600].reshape(4, 5, 30), b[7:607].reshape(4, 5, 30)),
        "other order": lambda b: (
            b[:600].reshape(4, 5, 30), b[:600].reshape(5, 30, 4).transpose(2, 0, 1),
        ),
        "reversed": lambda b: (b[:600].reshape(4, 5, 30), b[599::-1].reshape(4, 5, 30)),
        "interleaved": lambda b: (b[::2][:600].reshape(4, 5, 30), b[1::2][:600].reshape(4, 5, 30)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", overlaps())
def test_out_that_overlaps_x_is_never_silently_wrong(rng, kind):
    buffer = rng.standard_normal(1300)
    x, out = overlaps()[kind](buffer)
    wanted, cache = fastbn.batch_norm(x.copy())
    dy = rng.standard_normal(x.shape)
    gradients = fastbn.batch_norm_backward(dy, cache)
    y, cache = fastbn.batch_norm(x, out=out)
    assert y is out
    np.testing.assert_array_equal(out, wanted)
    if kind == "interleaved":
        np.testing.assert_array_equal(fastbn.batch_norm_backward(dy, cache)[0], gradients[0])
    else:
        with pytest.raises(ValueError, match="cache: x is needed for the gradients, but out="):
            fastbn.batch_norm_backward(dy, cache)


@pytest.mark.parametrize("kind", overlaps())
def test_inference_out_may_overlap_x(rng, kind):
    buffer = rng.standard_normal(1300)
    x, out = overlaps()[kind](buffer)
    wanted = fastbn.batch_norm_inference(x.copy(), np.ones(5), np.ones(5))
    np.testing.assert_array_equal(
        fastbn.batch_norm_inference(x, np.ones(5), np.ones(5), out=out), wanted
    )


@pytest.mark.parametrize("kind", overlaps())
@pytest.mark.parametrize("over", ["x", "dy"])
def test_backward_out_may_overlap_x_or_dy(rng, kind, over):
    buffer = rng.standard_normal(1300)
    one, out = overlaps()[kind](buffer)
    other = rng.standard_normal(one.shape)
    x, dy = (one, other) if over == "x" else (other, one)
    _, cache = fastbn.batch_norm(x.copy())
    wanted = fastbn.batch_norm_backward(dy.copy(), cache)
    _, cache = fastbn.batch_norm(x)
    actual = fastbn.batch_norm_backward(dy, cache, out=out)
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(a, w)
    if over == "x" and kind != "interleaved":
        with pytest.raises(ValueError, match="cache: x is needed"):
            fastbn.batch_norm_backward(other, cache)


def test_out_may_share_memory_with_the_parameters(rng):
    x = rng.standard_normal((4, 3, 5))
    buffer = rng.random(60)
    gamma, beta, mean, var = buffer[:3], buffer[10:13], buffer[20:23], buffer[57:]
    out = buffer.reshape(x.shape)
    copies = [a.copy() for a in (gamma, beta, mean, var)]
    wanted, _ = fastbn.batch_norm(x, copies[0], copies[1])
    np.testing.assert_array_equal(fastbn.batch_norm(x, gamma, beta, out=out)[0], wanted)
    for array, value in zip((gamma, beta, mean, var), copies, strict=True):
        array[...] = value
    wanted = fastbn.batch_norm_inference(x, copies[2], copies[3], copies[0], copies[1])
    actual = fastbn.batch_norm_inference(x, mean, var, gamma, beta, out=out)
    np.testing.assert_array_equal(actual, wanted)


def test_gradients_come_in_the_shape_and_dtype_of_the_parameters(rng):
    z = rng.standard_normal((5, 8)).astype(np.float32)  # the course's (n_h, m)
    for shape in [(5,), (5, 1), (1, 5, 1)]:
        for dtype in (*DTYPES, ">f8"):
            gamma, beta = np.ones(shape, dtype), np.zeros(shape, dtype)
            _, cache = fastbn.batch_norm(z, gamma, beta, axis=0)
            _, dgamma, dbeta = fastbn.batch_norm_backward(z, cache)
            assert dgamma.shape == dbeta.shape == shape
            assert dgamma.dtype == dbeta.dtype == np.dtype(dtype).newbyteorder("=")
    for parameter in (None, [1] * 5, np.ones(5, int)):
        _, cache = fastbn.batch_norm(z, parameter, parameter, axis=0)
        _, dgamma, dbeta = fastbn.batch_norm_backward(z, cache)
        assert dgamma.shape == dbeta.shape == (5,)
        assert dgamma.dtype == dbeta.dtype == np.float32


def test_parameters_may_change_before_the_backward_pass(rng):
    x = rng.standard_normal((6, 3))
    gamma = np.array([1.0, 2.0, 3.0])
    _, cache = fastbn.batch_norm(x, gamma)
    wanted = fastbn.batch_norm_backward(x, cache)
    gamma[:] = -1
    np.testing.assert_array_equal(fastbn.batch_norm_backward(x, cache)[0], wanted[0])


def test_none_stands_for_ones_and_zeros(rng):
    x = rng.standard_normal((6, 3))
    plain, _ = fastbn.batch_norm(x)
    np.testing.assert_array_equal(fastbn.batch_norm(x, np.ones(3), np.zeros(3))[0], plain)


def test_lists_and_integers_become_float64():
    for x in ([[1, 2], [3, 4], [5, 9]], np.array([[1, 2], [3, 4], [5, 9]])):
        y, cache = fastbn.batch_norm(x, [1, 1], [0, 0])
        assert y.dtype == np.float64
        assert_close(y, reference.batch_norm(x)[0])
        dx, _, dbeta = fastbn.batch_norm_backward([[1, 2], [3, 4], [5, 6]], cache)
        assert dx.dtype == np.float64
        np.testing.assert_array_equal(dbeta, [9, 12])


def test_one_value_per_channel_gives_beta(variant):
    x = np.float32([[3, -4, 1e30]])
    y, cache = fastbn.batch_norm(x, None, [1, 2, 3])
    np.testing.assert_array_equal(y, [[1, 2, 3]])
    np.testing.assert_array_equal(cache.var, 0)
    dx, _, dbeta = fastbn.batch_norm_backward(np.float32([[1, 2, 3]]), cache)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dbeta, [1, 2, 3])


def test_eps_of_zero_is_allowed():
    y, _ = fastbn.batch_norm(np.array([[1.0], [3.0]]), eps=0)
    np.testing.assert_array_equal(y, [[-1], [1]])


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 0)])
def test_no_values_are_an_error_in_training_and_fine_in_inference(shape):
    with pytest.raises(ValueError, match=r"x: expected at least one value per channel, got shape"):
        fastbn.batch_norm(np.zeros(shape))
    y = fastbn.batch_norm_inference(np.zeros(shape, np.float32), np.zeros(3), np.ones(3))
    assert y.shape == shape
    assert y.dtype == np.float32


def test_one_value_gives_beta_unless_it_divides_by_zero():
    for x, norm in (([[5.0, 7.0]], fastbn.batch_norm), ([[[5.0], [7.0]]], fastbn.instance_norm)):
        np.testing.assert_array_equal(np.ravel(norm(x, [1, 2], [3, 4])[0]), [3, 4])
        np.testing.assert_array_equal(np.ravel(norm(x, [1, 2], [3, 4], eps=1e-300)[0]), [3, 4])
        assert np.isnan(norm(x, [1, 2], [3, 4], eps=0)[0]).all()


def test_no_channels_give_an_empty_result():
    y, cache = fastbn.batch_norm(np.zeros((4, 0)))
    assert y.shape == (4, 0)
    dx, dgamma, _ = fastbn.batch_norm_backward(np.zeros((4, 0)), cache)
    assert dx.shape == (4, 0)
    assert dgamma.shape == (0,)


def test_subclasses_give_plain_arrays_and_memmaps_work(tmp_path, rng):
    x = rng.standard_normal((6, 3))
    mapped = np.memmap(tmp_path / "x", np.float64, "w+", shape=x.shape)
    mapped[...] = x
    y, _ = fastbn.batch_norm(mapped)
    assert type(y) is np.ndarray
    fastbn.batch_norm(x, out=mapped)
    np.testing.assert_array_equal(mapped, y)


X = np.ones((4, 3))
READ_ONLY = read_only(np.ones((4, 3)))
MASKED = np.ma.masked_array(X, X > 0)
EXPECTED_FLOATS = "expected float16, bfloat16, float32 or float64"


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        (X.astype(complex), {}, TypeError, f"x: {EXPECTED_FLOATS}, got complex128"),
        (X.astype(np.longdouble), {}, TypeError, f"x: {EXPECTED_FLOATS}, got"),
        (None, {}, TypeError, f"x: {EXPECTED_FLOATS}, got object"),
        ("text", {}, TypeError, f"x: {EXPECTED_FLOATS}, got <U4"),
        (MASKED, {}, TypeError, "x: expected an array without a mask, got a masked array"),
        ([[1.0], [1.0, 2.0]], {}, ValueError, "x: expected an array_like of numbers, got"),
        (X[0], {}, ValueError, "axis: expected an axis of x, which has 1 dimension(s), got 1"),
        (np.float64(1), {}, ValueError, "axis: expected an axis of x, which has 0 dimension(s)"),
        (X, {"axis": 2}, ValueError, "axis: expected an axis of x, which has 2 dimension(s)"),
        (X, {"axis": 1.0}, TypeError, "axis: expected an integer, got float"),
        (X, {"axis": None}, TypeError, "axis: expected an integer, got NoneType"),
        (X, {"gamma": np.ones(4)}, ValueError,
         "gamma: expected 3 value(s), one per channel, got shape (4,)"),
        (X, {"gamma": 1.0}, ValueError,
         "gamma: expected 3 value(s), one per channel, got shape ()"),
        (X, {"gamma": ["a", "b", "c"]}, TypeError, f"gamma: {EXPECTED_FLOATS}, got <U1"),
        (X, {"beta": np.ones((3, 2))}, ValueError,
         "beta: expected 3 value(s), one per channel, got shape (3, 2)"),
        (X, {"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
        (X, {"eps": np.nan}, ValueError, "eps: expected a finite number >= 0, got nan"),
        (X, {"eps": np.inf}, ValueError, "eps: expected a finite number >= 0, got inf"),
        (X, {"eps": "a"}, TypeError, "eps: expected a number, got str"),
        (X, {"out": [1.0]}, TypeError, "out: expected an ndarray or None, got list"),
        (X, {"out": MASKED}, TypeError, "out: expected an ndarray or None, got MaskedArray"),
        (X, {"out": np.ones((3, 4))}, ValueError,
         "out: expected shape (4, 3) and dtype float64, as x has, got shape (3, 4) and"),
        (X, {"out": np.ones((4, 3), np.float32)}, ValueError,
         "out: expected shape (4, 3) and dtype float64, as x has, got shape (4, 3) and dtype"),
        (X, {"out": READ_ONLY}, ValueError, "out: expected a writeable array, got a read-only one"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(x, arguments, error, message):
    target = np.full((4, 3), 7.0)
    arguments = {"out": target, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        fastbn.batch_norm(x, **arguments)
    with pytest.raises(error, match=re.escape(message)):
        fastbn.batch_norm_inference(x, np.zeros(3), np.ones(3), **arguments)
    np.testing.assert_array_equal(target, 7)


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        ((np.zeros(2), np.ones(3)), ValueError, "mean: expected 3 value(s), one per channel, got"),
        ((np.zeros(3), np.ones(2)), ValueError, "var: expected 3 value(s), one per channel, got"),
        ((None, np.ones(3)), TypeError, "mean: expected 3 value(s), one per channel, got None"),
        ((np.zeros(3), None), TypeError, "var: expected 3 value(s), one per channel, got None"),
        ((np.zeros(3), [1, -2, 3]), ValueError, "var: expected values >= 0, got -2.0"),
    ],
)
def test_bad_statistics_are_named_and_nothing_is_written(statistics, error, message):
    target = np.full((4, 3), 7.0)
    with pytest.raises(error, match=re.escape(message)):
        fastbn.batch_norm_inference(X, *statistics, out=target)
    np.testing.assert_array_equal(target, 7)


@pytest.mark.parametrize(
    ("dy", "arguments", "error", "message"),
    [
        (X.astype(np.float32), {}, TypeError, "dy: expected dtype float64, as x has, got float32"),
        (X.astype(int), {}, None, None),
        (X.T, {}, ValueError, "dy: expected shape (4, 3), as x has, got (3, 4)"),
        (X[0], {}, ValueError, "dy: expected shape (4, 3), as x has, got (3,)"),
        (MASKED, {}, TypeError, "dy: expected an array without a mask"),
        (None, {}, TypeError, f"dy: {EXPECTED_FLOATS}, got object"),
        (
            X,
            {"cache": "y"},
            TypeError,
            "cache: expected what batch_norm returned beside y, got str",
        ),
        (X, {"out": np.ones(3)}, ValueError, "out: expected shape (4, 3) and dtype float64, as x"),
        (X, {"out": READ_ONLY}, ValueError, "out: expected a writeable array, got a read-only one"),
    ],
)
def test_bad_gradients_are_named_and_nothing_is_written(dy, arguments, error, message):
    target = np.full((4, 3), 7.0)
    arguments = {"out": target, "cache": fastbn.batch_norm(X)[1], **arguments}
    if error is None:
        assert fastbn.batch_norm_backward(dy, **arguments)[0] is target
        return
    with pytest.raises(error, match=re.escape(message)):
        fastbn.batch_norm_backward(dy, **arguments)
    np.testing.assert_array_equal(target, 7)


def test_a_gamma_resized_after_forward_costs_no_memory_of_others(rng):
    x = rng.standard_normal((8, 1000)).astype(np.float32)
    gamma = np.ones(1000, np.float32)
    _, cache = fastbn.batch_norm(x, gamma)
    gamma.resize(4, refcheck=False)
    _, dgamma, _ = fastbn.batch_norm_backward(x, cache)
    assert dgamma.shape == (1000,)


def test_x_may_be_overwritten_by_a_call_that_dy_makes(rng):
    x = rng.standard_normal((8, 3))
    _, cache = fastbn.batch_norm(x)

    class Meddling:
        def __array__(self, dtype=None, copy=None):
            fastbn.batch_norm_backward(np.ones((8, 3)), cache, out=x)
            return np.ones((8, 3))

    with pytest.raises(ValueError, match="cache: x is needed for the gradients"):
        fastbn.batch_norm_backward(Meddling(), cache)


class Running:
    """An array_like that runs something when an array is made of it."""

    def __init__(self, action, array):
        self.action, self.array = action, array

    def __array__(self, dtype=None, copy=None):
        self.action()
        return self.array


def test_out_may_be_changed_by_a_call_that_dy_makes(rng):
    x, dy = rng.standard_normal((2, 8, 16))
    _, cache = fastbn.batch_norm(x)
    out = np.zeros((8, 16))
    shrinking = Running(lambda: out.resize((1, 16), refcheck=False), dy)
    with pytest.raises(ValueError, match=re.escape("out: expected shape (8, 16)")):
        fastbn.batch_norm_backward(shrinking, cache, out=out)
    fixed = np.zeros((8, 16))
    freezing = Running(lambda: fixed.setflags(write=False), dy)
    with pytest.raises(ValueError, match="out: expected a writeable array, got a read-only one"):
        fastbn.batch_norm_backward(freezing, cache, out=fixed)
    np.testing.assert_array_equal(fixed, 0)
    overwriting = Running(lambda: fastbn.batch_norm_backward(dy, cache, out=x), np.ones(16))
    with pytest.raises(ValueError, match="cache: x is needed for the gradients"):
        fastbn.batch_norm_backward_apply(dy, cache, overwriting, np.ones(16))
