"""Tensors and arrays that share memory: the ways that are too rare for `functional/tensors.pxi`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version as increment_version

from fastbn.functional import entry

Array = NDArray[Any]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def array_of(tensor: Tensor) -> Array | None:
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


def as_tensor(array: Array) -> Tensor:
    """Return the memory of an array as a tensor."""
    if array.dtype == entry.BFLOAT16_BITS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def wide(values: Any) -> Any:
    """Return values that NumPy can read: those of bfloat16 as float32."""
    if values is None or values.dtype != entry.BFLOAT16_BITS:
        return values
    return np.left_shift(values.view(np.uint16), 16, dtype=np.uint32).view(np.float32)


def gradient(dy: Tensor, x: Tensor) -> Array:
    """Return the array of a gradient, in memory as x is."""
    if dy.stride() != x.stride() or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    array = entry.array_of(dy)
    if array is None:
        raise TypeError(f"grad_output: expected a dense Tensor of the CPU, got {type(dy).__name__}")
    return array


def update_running(cache: entry.Cache, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Move running statistics, in any memory, by the average of those of all examples."""
    means, variances = np.atleast_2d(cache.mean, cache.var)
    count = cache.moments.count / len(means)
    move(mean, torch.from_numpy(means.mean(0)), momentum)
    move(var, torch.from_numpy(variances.mean(0) * (count / (count - 1))), momentum)


def move(running: Tensor, batch: Tensor, momentum: float) -> None:
    """Average a running statistic with that of a minibatch, in float64."""
    with torch.no_grad():
        running.copy_((1 - momentum) * running.double() + momentum * batch)


entry.know_tensors(Tensor, torch.nn.Parameter, torch.from_numpy, sys.modules[__name__])
