"""The specification: batch normalisation in plain NumPy, each step beside its formula.

The same functions as in `fastbn`, slow and readable. Everything is computed in float64 and rounded
to the type of x once, at the end. The notation is that of Ioffe and Szegedy [1]_; in the course's
words, x is Z, y is Z tilde.

.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
   Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
"""

from copy import copy
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Moments",
    "batch_moments",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_inference",
    "instance_norm",
    "instance_norm_backward",
    "merge_moments",
    "normalize",
]

Array: TypeAlias = NDArray[Any]
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}  # of the activations, below 0


class Moments(NamedTuple):
    """Mean and (biased) variance of each channel, shape (C,), over `count` values."""

    mean: Array
    var: Array
    count: int  # type: ignore[assignment]  # it hides the method of tuple


class Cache(NamedTuple):
    """What the backward pass needs of the forward pass; `mean` and `var` have shape (C,)."""

    mean: Array
    var: Array
    count: int  # type: ignore[assignment]
    x: Array
    gamma: ArrayLike | None
    beta: ArrayLike | None
    axis: int
    z_hat: Array
    rstd: Array  # 1 / sqrt(var + eps); broadcasts against x
    slope: Array  # dy/da of the activation y = act(a)
    valid: Array  # where the mask has a position count, in x's shape
    residual: bool


class Groups(NamedTuple):
    """The caches of groups of examples; `mean` and `var` have shape (groups, C)."""

    mean: Array
    var: Array
    caches: tuple[Cache, ...]
    batch: int  # the axis of the examples


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Normalise x by the mean and variance of each channel; see `fastbn.batch_norm`."""
    x = _floats(x)
    options: dict[str, Any] = {"axis": axis, "eps": eps, "activation": activation}
    if virtual_batch_size is not None:
        arrays = {"residual": residual, "mask": mask}
        return _in_groups(x, virtual_batch_size, arrays, out, gamma=gamma, beta=beta, **options)
    valid = np.ones(x.shape, bool)
    if mask is not None:
        valid &= np.expand_dims(mask, axis)
    moments = _moments(x, axis, valid)
    y, cache = normalize(x, moments, gamma, beta, residual=residual, out=out, **options)
    y[~valid] = 0
    return y, cache._replace(valid=valid, z_hat=np.where(valid, cache.z_hat, 0))


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Groups]:
    """Normalise each example by itself; see `fastbn.instance_norm`."""
    options: dict[str, Any] = {"axis": axis, "eps": eps, "activation": activation}
    arrays = {"residual": residual}
    return _in_groups(_floats(x), 1, arrays, out, gamma=gamma, beta=beta, **options)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise x by a given mean and variance; see `fastbn.batch_norm_inference`."""
    moments = Moments(np.ravel(mean), np.ravel(var), 1)
    options: dict[str, Any] = {"axis": axis, "eps": eps, "activation": activation}
    return normalize(x, moments, gamma, beta, residual=residual, out=out, **options)[0]


def batch_norm_backward(
    dy: ArrayLike, cache: Cache | Groups, *, out: Array | None = None
) -> tuple[Array, ...]:
    """Take the gradient of a loss from y back; see `fastbn.batch_norm_backward`."""
    caches, batch = (cache.caches, cache.batch) if isinstance(cache, Groups) else ((cache,), 0)
    cuts = np.cumsum([each.x.shape[batch] for each in caches])[:-1]
    sums, images = [], []
    for part, each in zip(np.split(np.asarray(dy), cuts, axis=batch), caches, strict=True):
        sums.append(batch_norm_backward_reduce(part, each))
        image = batch_norm_backward_apply(part, each, *sums[-1])
        images.append(image if each.residual else (image,))
    dgamma, dbeta = np.sum(sums, axis=0)
    dx, *dresidual = (np.concatenate(parts, axis=batch) for parts in zip(*images, strict=True))
    dgamma = _like_parameter(dgamma, caches[0].gamma, dx)
    dbeta = _like_parameter(dbeta, caches[0].beta, dx)
    return _rounded(dx, dx.dtype, out), dgamma, dbeta, *dresidual


def instance_norm_backward(
    dy: ArrayLike, cache: Groups, *, out: Array | None = None
) -> tuple[Array, ...]:
    """Take the gradients of `instance_norm`; see `fastbn.instance_norm_backward`."""
    return batch_norm_backward(dy, cache, out=out)


def batch_moments(x: ArrayLike, *, axis: int = 1) -> Moments:
    """Return the statistics of each channel; see `fastbn.batch_moments`."""
    x = _floats(x)
    return _moments(x, axis, np.ones(x.shape, bool))


def merge_moments(*moments: Moments) -> Moments:
    """Return the statistics of all parts together; see `fastbn.merge_moments`."""
    # mean = sum n_i mean_i / N           var = sum n_i (var_i + (mean_i - mean)^2) / N
    count = sum(m.count for m in moments)
    mean = sum(m.count * m.mean for m in moments) / max(count, 1)
    var = sum(m.count * (m.var + (m.mean - mean) ** 2) for m in moments) / max(count, 1)
    return Moments(np.asarray(mean), np.asarray(var), count)


def normalize(
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """Normalise a part of a minibatch by the moments of all of it; see `fastbn.normalize`."""
    x = _floats(x)
    mean, var = (_per_channel(m, x, axis) for m in moments[:2])
    # z_hat = (z - mean_c) / sqrt(var_c + eps)
    z_hat = (x.astype(np.float64) - mean) / np.sqrt(var + eps)
    # a = gamma_c * z_hat + beta_c + residual
    scale = 1.0 if gamma is None else _per_channel(gamma, x, axis)
    shift = 0.0 if beta is None else _per_channel(beta, x, axis)
    a = scale * z_hat + shift
    if residual is not None:
        a = a + np.asarray(residual).astype(np.float64)
    # y = a where a > 0, slope * a elsewhere
    slope = np.where(a <= 0, SLOPES[activation], 1.0)
    y = np.where(slope, a, 0) * slope
    # Copies: the optimizer changes gamma in place before the next forward pass.
    gamma, beta = (None if p is None else copy(p) for p in (gamma, beta))
    rstd, valid = 1 / np.sqrt(var + eps), np.ones(x.shape, bool)
    cache = Cache(*moments, x, gamma, beta, axis, z_hat, rstd, slope, valid, residual is not None)
    return _rounded(y, x.dtype, out), cache


def batch_norm_backward_reduce(dy: ArrayLike, cache: Cache) -> tuple[Array, Array]:
    """Take the sums of the gradients; see `fastbn.batch_norm_backward_reduce`."""
    others, da = _other_axes(cache.x, cache.axis), _through_activation(dy, cache)
    # dbeta_c = sum dy                     dgamma_c = sum dy * z_hat
    dbeta = da.sum(axis=others)
    dgamma = (da * cache.z_hat).sum(axis=others)
    return dgamma, dbeta


def batch_norm_backward_apply(
    dy: ArrayLike, cache: Cache, dgamma: ArrayLike, dbeta: ArrayLike, *, out: Array | None = None
) -> Any:
    """Take the gradient of x by given sums; see `fastbn.batch_norm_backward_apply`."""
    x, axis, count = cache.x, cache.axis, max(cache.count, 1)  # a mask may leave a group none
    gamma = 1.0 if cache.gamma is None else _per_channel(cache.gamma, x, axis)
    dgamma, dbeta = _per_channel(dgamma, x, axis), _per_channel(dbeta, x, axis)
    da = _through_activation(dy, cache)
    # dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)
    dx = gamma * cache.rstd * (da - dbeta / count - cache.z_hat * dgamma / count)
    dx = _rounded(np.where(cache.valid, dx, 0), x.dtype, out)
    return (dx, _rounded(da, x.dtype, None)) if cache.residual else dx


def _through_activation(dy: ArrayLike, cache: Cache) -> Array:
    """Return da = dy * act'(a). Without an activation da is dy."""
    counts = cache.slope * cache.valid
    return np.where(counts, np.asarray(dy).astype(np.float64), 0) * cache.slope


def _moments(x: Array, axis: int, valid: Array) -> Moments:
    others = _other_axes(x, axis)
    count = int(valid.sum()) // x.shape[axis]
    z = np.where(valid, x.astype(np.float64), 0)
    # mean_c = (1/M) sum x                 var_c = (1/M) sum (x - mean_c)^2
    mean = z.sum(axis=others, keepdims=True) / max(count, 1)
    var = ((z - mean) ** 2).sum(axis=others, where=valid) / max(count, 1)
    return Moments(mean.reshape(-1), var, count)


def _in_groups(
    x: Array, size: int, arrays: dict[str, Any], out: Array | None, *, axis: int, **options: Any
) -> tuple[Array, Groups]:
    """Normalise some examples at a time, each group by statistics of its own."""
    batch = x.ndim - 1 if 0 not in _other_axes(x, axis) else 0
    cuts = range(size, x.shape[batch], size)
    parts = np.split(x, cuts, axis=batch)
    cut: dict[str, Any] = {
        name: np.split(array, cuts, axis=-1 if batch else 0)  # a mask has no axis of channels
        for name, array in arrays.items()
        if array is not None
    }
    results = [
        batch_norm(part, axis=axis, **options, **{name: cut[name][i] for name in cut})
        for i, part in enumerate(parts)
    ]
    ys, caches = zip(*results, strict=True)
    mean, var = (np.array([getattr(cache, name) for cache in caches]) for name in ("mean", "var"))
    return _rounded(np.concatenate(ys, axis=batch), x.dtype, out), Groups(mean, var, caches, batch)


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


def _like_parameter(gradient: Array, parameter: ArrayLike | None, dx: Array) -> Array:
    """Return the gradient in the parameter's shape and dtype, or in those it would have had."""
    shape = gradient.shape if parameter is None else np.shape(parameter)
    dtype = dx.dtype if dx.dtype.itemsize > 2 else np.dtype(np.float32)
    if isinstance(parameter, np.ndarray) and _is_float(parameter):
        dtype = parameter.dtype
    return gradient.reshape(shape).astype(dtype.newbyteorder("="))
