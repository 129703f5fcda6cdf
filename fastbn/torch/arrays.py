"""Tensors as arrays, without a copy, and the functions called on them, without autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbn.functional import entry
from fastbn.runtime import memory
from fastbn.runtime.pool import follow_num_threads

Array = NDArray[Any]

RECYCLED = 2 << 20  # bytes: larger results lie in memory that earlier ones left
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _slow_array_of(tensor: Tensor) -> Array | None:
    """Do as `entry.array_of`, where PyTorch is older than 2.10."""
    strided = tensor.is_cpu and tensor.layout is torch.strided
    if not strided or tensor.dtype not in FLOATS or tensor.is_neg():
        return None
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # NumPy has none
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(entry.BFLOAT16_BITS)
    array: Array = tensor.numpy()
    return array


entry.know_tensors(Tensor, torch.nn.Parameter, _slow_array_of)


def as_tensor(array: Array) -> Tensor:
    """Return the memory of an array as a tensor."""
    if array.dtype == entry.BFLOAT16_BITS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def result_like(x: Tensor, array: Array) -> tuple[Tensor, Any]:
    """Return a tensor like x, which is still to be filled, and its memory as an array."""
    if array.nbytes > RECYCLED:
        array = memory.empty_like(array)
        return as_tensor(array), array
    result = torch.empty_like(x)
    return result, entry.array_of(result)


def forward(
    arrays: list[Any], own: bool, group: int | None, eps: float, activation: str | None, keep: bool,
    out: Array,
) -> entry.Cache:  # fmt: skip
    """Normalise what `entry.arrays_of` returned, by its own statistics or by mean and var."""
    follow_num_threads(torch.get_num_threads())
    x, residual, *values = arrays
    if x.itemsize == 2:
        values = map(wide, values)
    gamma, beta, mean, var = values
    statistics = None if own else (mean, var)
    return entry.forward(
        x, statistics, gamma, beta, 1, eps, activation, residual, None, group, out, keep
    )[1]


def wide(values: Any) -> Any:
    """Return what NumPy can read, where it is bfloat16."""
    if values is None or values.dtype != entry.BFLOAT16_BITS:
        return values
    return np.left_shift(values.view(np.uint16), 16, dtype=np.uint32).view(np.float32)


def backward(
    dy: Tensor, x: Tensor, array: Array, group: int | None, state: entry.State, out: Array
) -> list[Tensor]:
    """Write the gradient of x into out; return those of weight, bias and the residual, if any."""
    follow_num_threads(torch.get_num_threads())
    cache = entry.restored(array, 1, group, state)
    return [as_tensor(each) for each in entry.backward(gradient(dy, x), cache, out)[1:]]


def gradient(dy: Tensor, x: Tensor) -> Array:
    """Return the gradient of y as an array, in memory as x is."""
    if dy.stride() != x.stride() or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    given = entry.array_of(dy)
    if given is None:
        raise RuntimeError(f"grad_output: expected a Tensor like the output, got {type(dy)}")
    return given


def update_running(cache: entry.Cache, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Move running statistics towards those of a minibatch, or the average of its examples'."""
    if cache.mean.ndim == 1:
        try:
            entry.update_running(cache, entry.array_of(mean), entry.array_of(var), momentum)
            torch.autograd.graph.increment_version((mean, var))
            return
        except ValueError:  # they have 16 bits, or do not lie together
            pass
    means, variances = np.atleast_2d(cache.mean, cache.var)
    count = cache.moments.count / len(means)
    move(mean, torch.from_numpy(means.mean(0)), momentum)
    move(var, torch.from_numpy(variances.mean(0) * (count / (count - 1))), momentum)


def move(running: Tensor, batch: Tensor, momentum: float) -> None:
    """Average a running statistic with that of a minibatch, in float64."""
    running.copy_((1 - momentum) * running.double() + momentum * batch)
