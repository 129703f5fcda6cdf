"""The normalisation layers, as PyTorch has them, around the functions."""

from fastbn.layers.layer import BatchNorm, InstanceNorm, update_statistics

__all__ = ["BatchNorm", "InstanceNorm", "update_statistics"]
