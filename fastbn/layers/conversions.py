"""The layer as others have it: folded into the map before it, from Keras, from ONNX.

These functions are methods of `BatchNorm`, the first argument of each is the layer or its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import checks
from fastbn.layers.base import Array

if TYPE_CHECKING:
    from fastbn.layers.batch_norm import BatchNorm


def fold_into(
    bn: BatchNorm, weight: ArrayLike, bias: ArrayLike | None = None, *, axis: int = 0
) -> tuple[Array, Array]:
    """Return the preceding linear map or convolution with this layer folded into it.

    In evaluation the layer is a scale and a shift of each channel, so that one map does for both,
    with s = gamma / sqrt(running_var + eps) ::

        weight' = weight * s        bias' = (bias - running_mean) * s + beta

    computed in float64 and rounded once. An activation of this layer and a residual are not part
    of it. Nothing is changed.

    Parameters
    ----------
    weight : array_like of float16, bfloat16, float32 or float64
        Of the map whose result the layer normalises, with `num_features` entries on `axis`.
    bias : array_like, optional
        The bias of that map, `num_features` values in any shape; None stands for zeros.
    axis : int
        The axis of the output channels: 0 for ``W @ A`` and PyTorch's linear layers and
        convolutions, 1 for ``x @ W`` and PyTorch's transposed convolutions.

    Returns
    -------
    weight, bias : ndarray
        New arrays of weight's dtype; bias in the shape that it was given in, or (C,).

    Raises
    ------
    RuntimeError
        If the layer has no running statistics.
    TypeError, ValueError
        If weight or bias is of another type or size, or weight has no such axis.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2, eps=0)
    >>> bn.running_mean[:], bn.running_var[:] = [1, 2], [4, 16]
    >>> weight, bias = bn.fold_into(np.array([[2.0, 4.0], [8.0, 4.0]]))
    >>> weight.tolist(), bias.tolist()
    ([[1.0, 2.0], [2.0, 1.0]], [-0.5, -0.5])
    """
    if bn.running_mean is None or bn.running_var is None:
        given = "this layer was made with track_running_stats=False"
        raise RuntimeError(f"fold_into: expected running statistics, {given}")
    w = checks.array("weight", weight)
    if not checks.is_float(w.dtype):
        raise TypeError(f"weight: expected float16, bfloat16, float32 or float64, got {w.dtype}")
    axis = checks.integer("axis", axis)
    if not -w.ndim <= axis < w.ndim or w.shape[axis] != bn.num_features:
        words = f"{bn.num_features} output channels on axis {axis}"
        raise ValueError(f"weight: expected {words}, got shape {w.shape}")
    b = np.zeros(bn.num_features) if bias is None else checks.array("bias", bias)
    if b.size != bn.num_features:
        raise ValueError(f"bias: expected {bn.num_features} values, got shape {b.shape}")
    flat = checks.values("bias", b.ravel(), bn.num_features)
    scale = bn.params.get("gamma", 1) / np.sqrt(bn.running_var + bn.eps)
    shift = (flat - bn.running_mean) * scale + bn.params.get("beta", 0)
    columns = [1] * w.ndim
    columns[axis] = -1
    folded = w.astype(np.float64) * scale.reshape(columns)
    return folded.astype(w.dtype), shift.reshape(b.shape).astype(w.dtype)


def from_keras(
    cls: type[BatchNorm], weights: Sequence[ArrayLike], momentum: float = 0.99,
    epsilon: float = 1e-3, *, axis: int = -1, center: bool = True, scale: bool = True,
    dtype: DTypeLike = np.float32,
) -> BatchNorm:  # fmt: skip
    """Make the layer that Keras's BatchNormalization with these weights is.

    In evaluation both give the same. Keras's running variance, of values divided by M, is taken as
    it is. Further training moves it towards the unbiased one, which is larger by M / (M - 1).

    Parameters
    ----------
    weights : sequence of array_like, shape (C,)
        What ``get_weights()`` returns: gamma if `scale`, beta if `center`, moving_mean,
        moving_variance.
    momentum : float
        As in Keras, the weight of the old value; the layer has 1 - momentum.
    epsilon, axis, dtype
        As eps, axis and dtype of `BatchNorm`.
    center, scale : bool
        Whether there is beta, and gamma. A layer has both or none: one that is missing in Keras is
        made of zeros or ones here, which further training would change.

    Returns
    -------
    BatchNorm
        In training mode, as any new layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNorm.from_keras([[1, 1], [0, 0], [5, 6], [7, 8]], momentum=0.75)
    >>> bn.momentum, bn.eps, bn.running_mean
    (0.25, 0.001, array([5., 6.]))
    """
    names = {"weight": "gamma"} if scale else {}
    names |= {"bias": "beta"} if center else {}
    names |= {"running_mean": "moving_mean", "running_var": "moving_variance"}
    if isinstance(weights, Mapping | str) or not hasattr(weights, "__len__"):
        raise TypeError(f"weights: expected a list of arrays, got {type(weights).__name__}")
    if len(weights) != len(names):
        words = f"{len(names)} arrays, {', '.join(names.values())}"
        raise ValueError(f"weights: expected {words}, got {len(weights)}")
    given = {k: (f"weights[{i}] ({names[k]})", weights[i]) for i, k in enumerate(names)}
    return _from_biased(cls, given, momentum, epsilon, axis, dtype)


def from_onnx(
    cls: type[BatchNorm], scale: ArrayLike, B: ArrayLike, mean: ArrayLike, var: ArrayLike, *,
    epsilon: float = 1e-5, momentum: float = 0.9, axis: int = 1, dtype: DTypeLike = np.float32,
) -> BatchNorm:  # fmt: skip
    """Make the layer that ONNX's BatchNormalization with these inputs and attributes is.

    In evaluation both give the same; the running variance is taken as it is, as in `from_keras`.

    Parameters
    ----------
    scale, B, mean, var : array_like, shape (C,)
        The inputs of the operator: gamma, beta, and the running statistics.
    epsilon, momentum, axis, dtype
        As in `from_keras`; in ONNX axis is always 1.

    Returns
    -------
    BatchNorm
        In training mode, as any new layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm.from_onnx([2, 2], [1, 1], [5, 6], [4, 4], epsilon=0).eval()
    >>> bn(np.array([[5.0, 8.0]]))
    array([[1., 3.]])
    """
    given = {"weight": ("scale", scale), "bias": ("B", B)}
    given |= {"running_mean": ("mean", mean), "running_var": ("var", var)}
    return _from_biased(cls, given, momentum, epsilon, axis, dtype)


def _from_biased(
    cls: type[BatchNorm], given: Mapping[str, tuple[str, ArrayLike]], momentum: float,
    epsilon: float, axis: int, dtype: DTypeLike,
) -> BatchNorm:  # fmt: skip
    """Make a layer from entries of its state, each with its name in Keras or ONNX."""
    weight, eps = 1 - checks.momentum(momentum), checks.eps("epsilon", epsilon)
    name, mean = given["running_mean"]
    shape = np.shape(mean)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"{name}: expected one value per channel, got shape {shape}")
    least = {"running_var": 0}
    values = {k: checks.values(*each, *shape, least.get(k)) for k, each in given.items()}
    affine = len(given) > 2
    bn = cls(*shape, axis=axis, eps=eps, momentum=weight, affine=affine, dtype=dtype)
    for key, array in bn._arrays().items():
        array[...] = values.get(key, array)
    return bn
