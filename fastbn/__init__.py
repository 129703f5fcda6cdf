"""Batch normalisation for NumPy on the CPU: fused, exact, the same bits everywhere."""

from fastbn import optim
from fastbn._dispatch import runtime_info
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_inference
from fastbn.layer import BatchNorm

__all__ = [
    "BatchNorm",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "optim",
    "runtime_info",
]
__version__ = "0.1.0"
