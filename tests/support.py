"""What the tests share: the tolerance, an exact computation, the kernel variants, subprocesses."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from fastbn.kernels.variants import available_isas

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

KERNELS = {isa: import_module(f"fastbn.kernels.{isa}") for isa in available_isas()}

BFLOAT16 = ml_dtypes and np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)]
DTYPES += [BFLOAT16] if ml_dtypes else []

# Above so many bytes of x and result several threads are used; tests of those follow a change.
ENOUGH = float(
    re.search(
        r"ENOUGH = (\S+)", (Path(__file__).parent.parent / "fastbn/runtime/pool.pyx").read_text()
    )[1]
)

# mean / std of the minibatches for which the numerical promises are made
MEANS_AND_STDS = [
    (0, 1), (10, 1), (1e3, 1), (1e4, 1), (1e6, 1), (1e4, 1e-2), (0, 1e-6), (0, 1e15), (0, 1e30),
]  # fmt: skip


def python(code, timeout=60, **environment):
    """Run code in an interpreter of its own; a variable that is None is unset; a hang fails."""
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], timeout=timeout, capture_output=True, text=True, check=False,
        env={name: value for name, value in environment.items() if value is not None},
    )  # fmt: skip


def write_blobs(folder):
    """Write 140 small images in three classes, easy to tell apart, and return the file's path."""
    rng = np.random.default_rng(3)
    y = np.arange(140) % 3
    x = rng.standard_normal((3, 4, 4))[y] + 0.3 * rng.standard_normal((140, 4, 4))
    np.savez(folder / "blobs.npz", x=x, y=y)
    return str(folder / "blobs.npz")


def finfo(dtype):
    return (ml_dtypes or np).finfo(dtype)


def tolerance(dtype, exact, scale):
    """Return the largest error allowed, where the largest value of the result is scale.

    float32: 2 eps of that is what we promise; statistics in float64 and three roundings of the
    elements stay below it. float64: the statistics are no wider than the elements, so sums of some
    thousand values and the reference's own rounding come on top; 64 eps covers both. 16-bit types:
    computed as float32, so as exact as that, and then rounded once, to the nearest: half the
    distance from one number of that type to the next, where the result itself lies.
    """
    info = finfo(dtype)
    if info.bits == 64:
        return 64 * info.eps * scale
    error = 2 * np.finfo(np.float32).eps * scale
    if info.bits == 16:
        _, exponent = np.frexp(exact)
        error = error + np.ldexp(float(info.eps), np.maximum(exponent, info.minexp + 1) - 2)
    return error


def assert_close(actual, exact, dtype=None, scale=None):
    """Assert that actual is exact up to `tolerance`, NaNs and infinities in the same places."""
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.shape == exact.shape
    if exact.size == 0:
        return
    scale = np.abs(exact).max() if scale is None else scale
    allowed = tolerance(dtype or actual.dtype, exact, scale)
    if np.ndim(allowed):  # assert_allclose knows only one for all
        assert np.isfinite(exact).all()
        assert (np.abs(actual - exact) <= allowed).all()
    else:
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
