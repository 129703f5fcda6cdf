"""What the tests share: the tolerance, exact arithmetic, the kernel variants, subprocesses."""

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
        r"ENOUGH = (\S+)",
        (Path(__file__).parent.parent / "fastbn/runtime/pool.pyx").read_text(encoding="utf-8"),
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


class Wide:
    """An array of numbers of some 32 digits, each the sum of two float64 ("double-double").

    On some platforms np.longdouble is no more than float64. [1]_ has the algorithms.

    .. [1] T. J. Dekker, "A floating-point technique for extending the available precision",
       Numerische Mathematik 18, 1971, https://doi.org/10.1007/BF01397083
    """

    __array_ufunc__ = None  # with an array on the left, these methods are asked

    def __init__(self, high, low=0.0):
        """Take float64 numbers, exactly; low is what rounding took from high."""
        high, low = np.broadcast_arrays(np.asarray(high, np.float64), low)
        self.high = high + low
        self.low = low - (self.high - high)

    def __add__(self, other):
        other = other if isinstance(other, Wide) else Wide(other)
        total = self.high + other.high
        part = total - self.high
        lost = (self.high - (total - part)) + (other.high - part)
        return Wide(total, lost + (self.low + other.low))

    def __mul__(self, other):
        other = other if isinstance(other, Wide) else Wide(other)
        product = self.high * other.high
        (a, b), (c, d) = (_halves(each.high) for each in (self, other))
        lost = ((a * c - product) + a * d + b * c) + b * d
        return Wide(product, lost + (self.high * other.low + self.low * other.high))

    def __truediv__(self, other):
        other = other if isinstance(other, Wide) else Wide(other)
        first = self.high / other.high
        return Wide(first) + Wide((self - other * first).high / other.high)

    def __neg__(self):
        return Wide(-self.high, -self.low)

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return Wide(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other):
        return (self[:, :, None] * other[None]).sum(1)

    def __getitem__(self, index):
        return Wide(self.high[index], self.low[index])

    def __array__(self, dtype=None, copy=None):
        return self.high.astype(dtype or np.float64)

    def sqrt(self):
        first = np.sqrt(self.high)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Wide(first, np.where(first, (self - Wide(first) * first).high / first / 2, 0))

    def sum(self, axis):
        """Return the sums along one axis, which are halved until one number is left."""
        total = Wide(np.moveaxis(self.high, axis, 0), np.moveaxis(self.low, axis, 0))
        while (n := len(total.high)) > 1:
            first, second, rest = (total[k : k + n // 2] for k in (0, n // 2, n // 2 * 2))
            half = first + second
            total = Wide(np.append(half.high, rest.high, 0), np.append(half.low, rest.low, 0))
        return total[0]


def _halves(values):
    """Return numbers of 26 bits and what is left of 53."""
    scaled = values * (2.0**27 + 1)
    first = scaled - (scaled - values)
    return first, values - first


def exact_batch_norm(x, gamma, beta, dy, axis, eps=1e-5):
    """Return y, dx, dgamma, dbeta, mean and var, computed in some 32 digits, as float64."""
    z, g = (np.moveaxis(a, axis, 0).reshape(x.shape[axis], -1) for a in (x, dy))
    some = max(1, 2**14 // z.shape[1])  # channels at a time: their numbers stay in a cache
    pieces = [
        _exact_channels(*(a[first : first + some] for a in (z, gamma, beta, g)), eps)
        for first in range(0, len(z), some)
    ]
    y, dx, *others = (np.concatenate(each) for each in zip(*pieces, strict=True))
    moved = np.moveaxis(x, axis, 0).shape
    return *(np.moveaxis(a.reshape(moved), 0, axis) for a in (y, dx)), *others


def _exact_channels(z, gamma, beta, g, eps):
    """Do so for z and g of shape (channels, count)."""
    z, g, count = Wide(z), Wide(g), z.shape[1]
    gamma, beta = Wide(gamma)[:, None], Wide(beta)[:, None]
    mean = z.sum(1)[:, None] / count
    z = z - mean
    var = (z * z).sum(1)[:, None] / count
    rstd = 1 / (var + eps).sqrt()
    z_hat = z * rstd
    dbeta, dgamma = g.sum(1)[:, None], (g * z_hat).sum(1)[:, None]
    dx = gamma * rstd * (g - dbeta / count - z_hat * (dgamma / count))
    y = gamma * z_hat + beta
    return y.high, dx.high, *(each.high[:, 0] for each in (dgamma, dbeta, mean, var))
