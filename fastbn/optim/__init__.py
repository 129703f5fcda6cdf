"""Optimizers over layers, hooks around their steps, and learning-rate decay.

A layer is anything with the mappings `params` and `grads`: the same keys, NumPy arrays of the same
shapes. An optimizer changes the arrays in `params` in place. Weight decay, in all its forms, passes
over scales, shifts and biases unless told otherwise; see `decays_by_name`.
"""

from fastbn.optim.optimizers import (
    SGD,
    Adam,
    AdamW,
    GradientClipping,
    Layer,
    Optimizer,
    RMSprop,
    WeightDecay,
    cosine_decay,
    decays_by_name,
    exponential_decay,
    inverse_time_decay,
    staircase_decay,
)

__all__ = [
    "Adam",
    "AdamW",
    "GradientClipping",
    "Layer",
    "Optimizer",
    "RMSprop",
    "SGD",
    "WeightDecay",
    "cosine_decay",
    "decays_by_name",
    "exponential_decay",
    "inverse_time_decay",
    "staircase_decay",
]
