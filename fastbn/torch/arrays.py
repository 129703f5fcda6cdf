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


def as_array(tensor: Tensor) -> Array:
    """Return the memory of a tensor as an array."""
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:  # NumPy has none
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(entry.BFLOAT16_BITS)
    array: Array = tensor.numpy()
    return array


def as_tensor(array: Array) -> Tensor:
    """Return the memory of an array as a tensor."""
    if array.dtype == entry.BFLOAT16_BITS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_parameter(tensor: Tensor | None) -> Array | None:
    """Return a value per channel as the functions take it: not in 16 bits."""
    if tensor is None:
        return None
    return as_array(tensor if tensor.element_size() > 2 else tensor.float())


def result_like(x: Tensor, array: Array) -> tuple[Tensor, Array]:
    """Return a tensor like x, which is still to be filled, and its memory as an array."""
    if array.nbytes > RECYCLED:
        array = memory.empty_like(array)
        return as_tensor(array), array
    result = torch.empty_like(x)
    return result, as_array(result)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, group: int | None, eps: float, activation: str | None, keep: bool,
    out: Array,
) -> entry.Cache:  # fmt: skip
    """Normalise x by mean and var, or by its own statistics: those of each `group` examples."""
    follow_num_threads(torch.get_num_threads())
    array, gamma, beta = as_array(x), as_parameter(weight), as_parameter(bias)
    addend = None if residual is None else as_array(residual)
    rest = (activation, addend, None, group, out, keep)
    if mean is None or var is None:
        return entry.forward(array, None, gamma, beta, 1, eps, *rest)[1]
    given = as_parameter(mean), as_parameter(var)
    try:
        return entry.forward(array, given, gamma, beta, 1, eps, *rest)[1]
    except ValueError:  # A variance below 0, which PyTorch does not refuse.
        wide = given[1].astype(np.float64) + eps
        wide[wide < 0] = np.nan
        return entry.forward(array, (given[0], wide), gamma, beta, 1, 0.0, *rest)[1]


def backward(
    dy: Tensor, x: Tensor, group: int | None, state: entry.State, out: Array
) -> list[Tensor]:
    """Write the gradient of x into out; return those of weight, bias and the residual, if any."""
    follow_num_threads(torch.get_num_threads())
    cache = entry.restored(as_array(x), 1, group, state)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    return [as_tensor(each) for each in entry.backward(as_array(dy), cache, out)[1:]]


def update_running(cache: entry.Cache, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Move running statistics towards those of a minibatch, or the average of its examples'."""
    wide = mean, var
    if mean.element_size() < 4 or not (mean.is_contiguous() and var.is_contiguous()):
        wide = mean.double().contiguous(), var.double().contiguous()
    arrays = as_array(wide[0]), as_array(wide[1])
    if cache.mean.ndim == 1:
        entry.update_running(cache, *arrays, momentum)
    else:
        count = cache.moments.count / len(cache.mean)
        new = cache.mean.mean(0), cache.var.mean(0) * (count / (count - 1))
        for running, batch in zip(arrays, new, strict=True):
            running[...] = (1 - momentum) * running.astype(np.float64) + momentum * batch
    torch.autograd.graph.increment_version((mean, var))
    if wide[0] is not mean:
        mean.copy_(wide[0])
        var.copy_(wide[1])
