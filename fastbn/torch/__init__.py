"""The same norms under PyTorch, for tensors on the CPU."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'fastbn.torch: expected PyTorch, which is not installed: pip install "fastbn[torch]"'
    ) from error

from fastbn.torch.convert import convert, revert
from fastbn.torch.functional import batch_norm, instance_norm
from fastbn.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from fastbn.torch.sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "instance_norm",
    "revert",
]
