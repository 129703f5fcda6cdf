"""The normalisation layers, as PyTorch has them, around the functions."""

from fastbn.layers.batch_norm import BatchNorm
from fastbn.layers.instance_norm import InstanceNorm
from fastbn.layers.statistics import update_statistics

__all__ = ["BatchNorm", "InstanceNorm", "update_statistics"]
