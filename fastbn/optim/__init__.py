"""Optimizers over layers, hooks around their steps, and learning-rate decay.

A layer is anything with the mappings `params` and `grads`: the same keys, NumPy arrays of the same
shapes. An optimizer changes the arrays in `params` in place. Weight decay, in all its forms, passes
over scales, shifts and biases unless told otherwise; see `decays_by_name`.
"""

from fastbn.optim.base import Optimizer
from fastbn.optim.hooks import GradientClipping, WeightDecay
from fastbn.optim.optimizers import SGD, Adam, AdamW, RMSprop
from fastbn.optim.parameters import Layer, decays_by_name
from fastbn.optim.schedules import (
    cosine_decay,
    exponential_decay,
    inverse_time_decay,
    staircase_decay,
)  # fmt: skip

__all__ = [
    "Adam", "AdamW", "GradientClipping", "Layer", "Optimizer", "RMSprop", "SGD", "WeightDecay",
    "cosine_decay", "decays_by_name", "exponential_decay", "inverse_time_decay", "staircase_decay",
]  # fmt: skip
