"""The specification: batch normalisation in plain NumPy, each step beside its formula.

The same functions as in `fastbn`, slow and readable. Everything is computed in float64 and rounded
to the type of x once, at the end. The notation is that of Ioffe and Szegedy [1]_; in the course's
words, x is Z, y is Z tilde.

.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
   Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
"""

from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_inference"]

Array = NDArray[Any]


class Cache(NamedTuple):
    """What the backward pass needs of the forward pass; `mean` and `var` have shape (C,)."""

    mean: Array
    var: Array
    x: Array
    gamma: ArrayLike | None
    beta: ArrayLike | None
    axis: int
    eps: float


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """Normalise x by the mean and variance of each channel; see `fastbn.batch_norm`."""
    x = _floats(x)
    others = _other_axes(x, axis)
    z = x.astype(np.float64)

    # mean_c = (1/M) sum x                 var_c = (1/M) sum (x - mean_c)^2
    mean = z.mean(axis=others, keepdims=True)
    var = ((z - mean) ** 2).mean(axis=others, keepdims=True)

    y = _normalize(z, mean, var, gamma, beta, axis, eps)
    # Copies: the optimizer changes gamma in place before the next forward pass.
    gamma, beta = (None if p is None else copy(p) for p in (gamma, beta))
    cache = Cache(mean.reshape(-1), var.reshape(-1), x, gamma, beta, axis, eps)
    return _rounded(y, x.dtype, out), cache


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """Normalise x by a given mean and variance; see `fastbn.batch_norm_inference`."""
    x = _floats(x)
    z = x.astype(np.float64)
    mean = _per_channel(mean, x, axis)
    var = _per_channel(var, x, axis)
    return _rounded(_normalize(z, mean, var, gamma, beta, axis, eps), x.dtype, out)


def batch_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Take the gradient of a loss from y back to x, gamma and beta.

    See `fastbn.batch_norm_backward`.
    """
    x, axis = cache.x, cache.axis
    others = _other_axes(x, axis)
    dz = np.asarray(dy).astype(np.float64)
    mean = _per_channel(cache.mean, x, axis)
    var = _per_channel(cache.var, x, axis)
    gamma = 1.0 if cache.gamma is None else _per_channel(cache.gamma, x, axis)
    count = x.size // x.shape[axis]

    rstd = 1 / np.sqrt(var + cache.eps)
    z_hat = (x.astype(np.float64) - mean) * rstd

    # dbeta_c = sum dy                     dgamma_c = sum dy * z_hat
    dbeta = dz.sum(axis=others, keepdims=True)
    dgamma = (dz * z_hat).sum(axis=others, keepdims=True)

    # dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)
    dx = gamma * rstd * (dz - dbeta / count - z_hat * dgamma / count)

    return (
        _rounded(dx, x.dtype, out),
        _like_parameter(dgamma, cache.gamma, x),
        _like_parameter(dbeta, cache.beta, x),
    )


def _normalize(
    z: Array,
    mean: Array,
    var: Array,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
) -> Array:
    # z_hat = (z - mean_c) / sqrt(var_c + eps)
    z_hat = (z - mean) / np.sqrt(var + eps)
    # y = gamma_c * z_hat + beta_c
    scale = 1.0 if gamma is None else _per_channel(gamma, z, axis)
    shift = 0.0 if beta is None else _per_channel(beta, z, axis)
    return np.asarray(scale * z_hat + shift)


def _floats(x: ArrayLike) -> Array:
    x = np.array(x)
    return x if _is_float(x) else x.astype(np.float64)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"  # of ml_dtypes


def _other_axes(x: Array, axis: int) -> tuple[int, ...]:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis: expected an axis of x, which has {x.ndim} dimension(s), got {axis}"
        )
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _per_channel(values: ArrayLike, x: Array, axis: int) -> Array:
    """Shape one value per channel so that it broadcasts against x."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return np.asarray(values, dtype=np.float64).reshape(shape)


def _rounded(result: Array, dtype: np.dtype[Any], out: Array | None) -> Array:
    if out is None:
        return result.astype(dtype.newbyteorder("="))
    out[...] = result
    return out


def _like_parameter(gradient: Array, parameter: ArrayLike | None, x: Array) -> Array:
    """Return the gradient in the parameter's shape and dtype, or in those it would have had."""
    like = np.empty(gradient.size) if parameter is None else np.asarray(parameter)
    dtype = like.dtype
    if not (isinstance(parameter, np.ndarray) and _is_float(like)):
        dtype = x.dtype if x.dtype.itemsize > 2 else np.dtype(np.float32)
    return gradient.reshape(like.shape).astype(dtype.newbyteorder("="))
