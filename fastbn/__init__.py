"""Batch normalisation for NumPy on the CPU: fused, exact, the same bits everywhere."""

from contextlib import suppress

import fastbn.runtime.blas  # noqa: F401  the first: before NumPy, and it tells what is not compiled

# isort: split
from fastbn import optim
from fastbn.checkpoint import load, save
from fastbn.functional import (
    Moments,
    batch_moments,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    batch_norm_inference,
    instance_norm,
    instance_norm_backward,
    merge_moments,
    normalize,
)
from fastbn.kernels.variants import runtime_info
from fastbn.layers import BatchNorm, InstanceNorm, update_statistics
from fastbn.runtime.memory import set_recycling
from fastbn.runtime.pool import get_num_threads, set_num_threads

__all__ = [
    "BatchNorm",
    "InstanceNorm",
    "Moments",
    "batch_moments",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_inference",
    "get_num_threads",
    "instance_norm",
    "instance_norm_backward",
    "load",
    "merge_moments",
    "normalize",
    "optim",
    "runtime_info",
    "save",
    "set_num_threads",
    "set_recycling",
    "update_statistics",
]
__version__ = "0.1.0"

with suppress(ImportError):  # threadpoolctl is not installed, or too old
    from fastbn.runtime import controller  # noqa: F401
