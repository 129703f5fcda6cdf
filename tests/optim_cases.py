"""Layers and optimizers that the tests of `fastbn.optim` share."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastbn import optim
from fastbn.hooks import HookList


class FakeLayer:
    """A layer with W and gamma, whose backward makes gradients from the parameters."""

    def __init__(self, seed=0, dtype=np.float32, shape=(5, 3)):
        rng = np.random.default_rng(seed)
        self.params = {
            "W": rng.standard_normal(shape).astype(dtype),
            "gamma": rng.standard_normal(7).astype(dtype),
        }
        self.grads = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.hooks = HookList()

    def register_grad_hook(self, hook):
        return self.hooks.register(hook)

    def backward(self, t=0):
        for name, p in self.params.items():
            # np.arange keeps the elements apart from each other.
            noise = np.cos(np.arange(p.size).reshape(p.shape) + t).astype(p.dtype)
            self.grads[name][...] = p - noise
        self.hooks.run(self)


def layer_of(**arrays):
    """A layer with the given parameters, and gradients of ones."""
    return SimpleNamespace(
        params=arrays, grads={name: np.ones_like(array) for name, array in arrays.items()}
    )


def snapshot(*layers):
    return [a.copy() for layer in layers for a in (*layer.params.values(), *layer.grads.values())]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


# How to make each optimizer, here and in torch.
VARIANTS = {
    "sgd": (optim.SGD, {"lr": 0.05}),
    "sgd decay": (optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "momentum decay": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "nesterov decay": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
    "rmsprop decay": (optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    "rmsprop momentum": (optim.RMSprop, {"lr": 0.01, "momentum": 0.8}),
    "rmsprop momentum decay": (optim.RMSprop, {"momentum": 0.8, "weight_decay": 0.1}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam decay": (
        optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    ),
    "adam no memory": (optim.Adam, {"lr": 0.01, "betas": (0.0, 0.0)}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw default": (optim.AdamW, {}),
}
variants = pytest.mark.parametrize(("cls", "options"), list(VARIANTS.values()), ids=list(VARIANTS))


def everything_decays(_name, _array):
    return True


def padded(a):
    big = np.zeros(tuple(2 * n + 1 for n in a.shape), a.dtype)
    view = big[..., *(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view
