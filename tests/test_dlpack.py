"""Arrays of other libraries, which offer their memory by DLPack, as arguments."""

import re

import numpy as np
import pytest

import fastbn

SHAPE = (4, 3, 5, 5)


class Foreign:
    """An array of which only DLPack is known."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def library(name):
    """Return a function that makes an array of a library from an ndarray, without a copy."""
    if name == "Foreign":
        return Foreign
    module = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[name])
    return module.from_numpy if name == "torch" else module.asarray


@pytest.mark.parametrize("name", ["Foreign", "torch", "jax"])
def test_each_argument_may_be_of_another_library(rng, name):
    foreign = library(name)
    x, residual, dy = rng.standard_normal((3, *SHAPE)).astype(np.float32)
    gamma, beta, mean = rng.standard_normal((3, 3)).astype(np.float32)
    var = np.float32([1, 2, 3])
    mask = rng.random((4, 5, 5)) < 0.7

    def results(made):
        a = {"gamma": made(gamma), "beta": made(beta), "residual": made(residual)}
        y, cache = fastbn.batch_norm(made(x), activation="relu", **a)
        masked, _ = fastbn.batch_norm(made(x), mask=made(mask))
        moments = fastbn.batch_moments(made(x))
        part, half = fastbn.normalize(made(x), moments, made(gamma))
        sums = fastbn.batch_norm_backward_reduce(made(dy), half)
        return [
            y, masked, part, *moments, *sums,
            *fastbn.batch_norm_backward(made(dy), cache),
            fastbn.batch_norm_backward_apply(made(dy), half, *map(made, np.float32(sums))),
            fastbn.batch_norm_inference(made(x), made(mean), made(var), **a),
            fastbn.instance_norm(made(x))[0],
            fastbn.BatchNorm(3)(made(x), mask=made(mask)),
        ]  # fmt: skip

    for actual, wanted in zip(results(foreign), results(np.asarray), strict=True):
        np.testing.assert_array_equal(actual, wanted)
        assert np.asarray(actual).dtype == np.asarray(wanted).dtype


def test_nothing_is_copied(rng):
    x, dy = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    _, cache = fastbn.batch_norm(Foreign(x))
    before = fastbn.batch_norm_backward(dy, cache)[0]
    x *= 2  # which the cache holds as well, so that the gradient is another
    assert (fastbn.batch_norm_backward(dy, cache)[0] != before).any()
    x /= 2
    # dx takes the place of dy, which must have been read before.
    assert fastbn.batch_norm_backward(Foreign(dy), cache, out=dy)[0] is dy
    np.testing.assert_array_equal(dy, before)


@pytest.mark.parametrize("make", [lambda a: a[:, :, ::2], lambda a: a.transpose(0, 2, 3, 1)])
def test_strides_are_followed(rng, make):
    x = make(rng.standard_normal(SHAPE))
    for actual in (Foreign(x), Foreign(x[:0])):
        wanted = fastbn.batch_moments(actual.array, axis=-1)
        np.testing.assert_array_equal(fastbn.batch_moments(actual, axis=-1).mean, wanted.mean)


def test_what_numpy_cannot_take_is_named():
    x = np.ones(SHAPE, np.float32)

    class OnADevice(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("on another device")

        def __array__(self, dtype=None, copy=None):
            raise TypeError("cannot leave the device")

    message = "expected an array_like of numbers, got OnADevice: cannot leave the device"
    for name, arguments in [("x", (OnADevice(x),)), ("gamma", (x, OnADevice(x)))]:
        with pytest.raises(TypeError, match=re.escape(f"{name}: {message}")):
            fastbn.batch_norm(*arguments)


def test_what_dlpack_cannot_give_but_numpy_can_is_taken():
    class Copied(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("on another device")

        def __array__(self, dtype=None, copy=None):
            return self.array.copy()

    x = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(fastbn.batch_norm(Copied(x))[0], fastbn.batch_norm(x)[0])


def test_a_tensor_that_requires_a_gradient_is_refused():
    torch = pytest.importorskip("torch")
    x = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(TypeError, match=re.escape("x: expected an array_like of numbers, got")):
        fastbn.batch_norm(x)


def test_bfloat16_of_jax_is_taken():
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3)
    y, _ = fastbn.batch_norm(x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, fastbn.batch_norm(np.asarray(x))[0])
