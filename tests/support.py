"""What the tests share: the tolerance, an exact computation, the kernel variants."""

from importlib import import_module

import numpy as np

from fastbn._dispatch import available_isas

KERNELS = {isa: import_module(f"fastbn._kernels_{isa}") for isa in available_isas()}

# mean / std of the minibatches for which the numerical promises are made
MEANS_AND_STDS = [
    (0, 1), (10, 1), (1e3, 1), (1e4, 1), (1e6, 1), (1e4, 1e-2), (0, 1e-6), (0, 1e15), (0, 1e30),
]  # fmt: skip


def tolerance(dtype):
    """Return the largest error allowed, relative to the largest value of the result.

    float32: 2 eps is what we promise; statistics in float64 and three roundings of the elements
    stay below it. float64: the statistics are no wider than the elements, so sums of some
    thousand values and the reference's own rounding come on top; 64 eps covers both.
    """
    return {np.float32: 2, np.float64: 64}[np.dtype(dtype).type] * np.finfo(dtype).eps


def assert_close(actual, exact, dtype=None, scale=None):
    """Assert that actual is exact up to `tolerance`, NaNs and infinities in the same places."""
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.shape == exact.shape
    if exact.size == 0:
        return
    scale = np.abs(exact).max() if scale is None else scale
    allowed = tolerance(dtype or actual.dtype) * scale
    np.testing.assert_allclose(actual, exact, rtol=0, atol=allowed)


def exact_batch_norm(x, gamma, beta, dy, axis, eps=1e-5):
    """Return y, dx, dgamma, dbeta, mean and var computed in long double."""
    wide = np.longdouble
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    z, g = x.astype(wide), dy.astype(wide)
    gamma, beta = gamma.astype(wide).reshape(shape), beta.astype(wide).reshape(shape)
    count = x.size // x.shape[axis]
    mean = z.mean(others, keepdims=True)
    var = ((z - mean) ** 2).mean(others, keepdims=True)
    rstd = 1 / np.sqrt(var + wide(eps))
    z_hat = (z - mean) * rstd
    dbeta = g.sum(others, keepdims=True)
    dgamma = (g * z_hat).sum(others, keepdims=True)
    dx = gamma * rstd * (g - dbeta / count - z_hat * dgamma / count)
    y = gamma * z_hat + beta
    return y, dx, dgamma.ravel(), dbeta.ravel(), mean.ravel(), var.ravel()
