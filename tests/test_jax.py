"""The recipe for JAX, docs/jax_batch_norm.py, where JAX is installed."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from support import BFLOAT16, assert_close, exact_batch_norm

import fastbn

jax = pytest.importorskip("jax")
jnp = jax.numpy
RECIPE = Path(__file__).parent.parent / "docs" / "jax_batch_norm.py"


@pytest.fixture(scope="module")
def batch_norm():
    return runpy.run_path(str(RECIPE))["batch_norm"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5, 6), 1), ((4, 5, 6, 3), -1)])
def test_values_and_gradients_are_exact(rng, batch_norm, shape, axis, compiled):
    x = (1000 + rng.standard_normal(shape)).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 3)).astype(np.float32)

    def step(x, gamma, beta):
        y, back, mean_and_var = jax.vjp(
            lambda *a: (lambda y, *rest: (y, rest))(*batch_norm(*a, axis)), x, gamma, beta,
            has_aux=True,
        )  # fmt: skip
        return y, *back(dy), *mean_and_var

    results = (jax.jit(step) if compiled else step)(x, gamma, beta)
    for actual, wanted in zip(results, exact_batch_norm(x, gamma, beta, dy, axis), strict=True):
        assert_close(actual, wanted.astype(np.float64), np.float32)


def test_large_arrays_pass(rng, batch_norm):
    # Callbacks have been known to wait for ever for the thread that runs them.
    x = rng.standard_normal((8, 64, 56, 56)).astype(np.float32)
    one, zero = jnp.ones(64), jnp.zeros(64)
    gradient = jax.jit(jax.grad(lambda x: (batch_norm(jnp.sin(x), one, zero)[0] ** 2).sum()))
    assert np.isfinite(gradient(x)).all()


def test_a_batch_of_minibatches(rng, batch_norm):
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    gamma, beta = jnp.ones(5), jnp.zeros(5)
    y = jax.vmap(lambda x: batch_norm(x, gamma, beta)[0])(x)
    for part, minibatch in zip(y, x, strict=True):
        np.testing.assert_array_equal(part, fastbn.batch_norm(minibatch)[0])


def test_sixteen_bits(rng, batch_norm):
    if BFLOAT16 is None:
        pytest.skip("bfloat16 needs ml_dtypes, which is not installed")
    x = jnp.asarray(rng.standard_normal((4, 5)), jnp.bfloat16)
    gamma, beta = jnp.ones(5), jnp.zeros(5)
    y, mean, _ = jax.jit(batch_norm)(x, gamma, beta)
    assert (y.dtype, mean.dtype) == (jnp.bfloat16, jnp.float32)
    dx = jax.grad(lambda x: batch_norm(x, gamma, beta)[0].astype(jnp.float32)[0].sum())(x)
    assert dx.dtype == jnp.bfloat16
    assert jnp.abs(dx).sum() > 0
