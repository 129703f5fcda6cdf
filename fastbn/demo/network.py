"""Layers put together: in a row, in residual blocks, as whole networks."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from fastbn import BatchNorm, InstanceNorm
from fastbn.demo.layers import Array, Conv2d, Flatten, GlobalAveragePool, Layer, Linear, ReLU

Part: TypeAlias = Layer | BatchNorm | InstanceNorm


class Container(Layer):
    """A layer made of others, kept by name in ``children``."""

    def __init__(self, **children: Part) -> None:
        super().__init__()
        self.children: dict[str, Any] = children

    def leaves(self) -> dict[str, Part]:
        """Return the innermost layers by dotted name; an optimizer takes their ``values()``."""
        found: dict[str, Part] = {}
        for name, child in self.children.items():
            if isinstance(child, Container):
                found |= {f"{name}.{inner}": leaf for inner, leaf in child.leaves().items()}
            else:
                found[name] = child
        return found

    def train(self, mode: bool = True) -> None:
        """Change all layers to training mode (``mode=False``: to evaluation mode)."""
        super().train(mode)
        for child in self.children.values():
            child.train(mode)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all parameters and running statistics, as "layer.name" -> value."""
        return {
            f"{name}.{key}": value
            for name, leaf in self.leaves().items()
            for key, value in leaf.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises
        ------
        ValueError
            If an entry is missing or unknown or has another shape or type; nothing changes then.
        """
        self._check(state)
        for name, leaf in self.leaves().items():
            leaf.load_state_dict({key: state[f"{name}.{key}"] for key in leaf.state_dict()})


class Sequential(Container):
    """Layers one after the other; without any, y = x."""

    def __init__(self, *layers: Part) -> None:
        super().__init__(**{str(index): layer for index, layer in enumerate(layers)})

    def forward(self, x: Array) -> Array:
        """Compute y."""
        for layer in self.children.values():
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, layer by layer from the last to the first: the chain rule."""
        for layer in reversed(self.children.values()):
            dy = layer.backward(dy)
        return dy


class ResBlock(Container):
    """y = relu(norm(main(x)) + shortcut(x)), from (m, C, H, W) to (m, O, H / stride, W / stride).

    ``main`` is convolution, norm and ReLU, convolution. ``shortcut`` is x itself, or where the
    shapes differ a 1 x 1 convolution and norm. ``end``, one layer, has the last norm, adds, and
    ends with ReLU. Parameters as in `resnet`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        stride: int = 1,
        norm: str,
        zero_gamma: bool = False,
        rng: np.random.Generator,
        dtype: DTypeLike = np.float32,
    ) -> None:
        conv = partial(Conv2d, bias=norm == "none", rng=rng, dtype=dtype)
        main = Sequential(
            conv(c_in, c_out, stride=stride),
            *norm_layers(norm, c_out, "relu", dtype),
            conv(c_out, c_out),
        )
        shortcut = Sequential()
        if (c_in, 1) != (c_out, stride):
            shortcut = Sequential(
                conv(c_in, c_out, 1, stride=stride), *norm_layers(norm, c_out, None, dtype)
            )
        (end,) = norm_layers(norm, c_out, "relu", dtype)
        if zero_gamma:
            end.params["gamma"][:] = 0
        # In this order a norm follows the convolution that it normalises: see `fold`.
        super().__init__(shortcut=shortcut, main=main, end=end)

    def forward(self, x: Array) -> Array:
        """Compute y."""
        shortcut, main, end = self.children.values()
        y: Array = end.forward(main.forward(x), residual=shortcut.forward(x))
        return y

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, the sum over both ways from x to y."""
        shortcut, main, end = self.children.values()
        dmain, dshortcut = end.backward(dy)
        dx: Array = main.backward(dmain) + shortcut.backward(dshortcut)
        return dx


def mlp(
    sizes: Sequence[int], *, norm: str, rng: np.random.Generator, dtype: DTypeLike = np.float32
) -> Sequential:
    """Build a multilayer perceptron; between two linear layers stand batch norm and ReLU, in one.

    Parameters
    ----------
    sizes : sequence of int
        Values of an input, units of each hidden layer, classes: ``[64, 128, 10]``.
    norm : str
        "batch", or "none": ReLU alone, and linear layers with a bias.
    rng : numpy.random.Generator
        Draws the weights.
    dtype : data-type
    """
    layers: list[Part] = [Flatten()]
    for n_in, n_out in pairwise(sizes[:-1]):
        layers.append(Linear(n_in, n_out, bias=norm == "none", rng=rng, dtype=dtype))
        layers += norm_layers(norm, n_out, "relu", dtype)
    layers.append(Linear(sizes[-2], sizes[-1], bias=True, rng=rng, dtype=dtype))
    return Sequential(*layers)


def resnet(
    sizes: Sequence[int],
    *,
    norm: str,
    zero_gamma: bool = False,
    rng: np.random.Generator,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Build a residual network: a convolution, residual blocks, a global mean, a linear layer.

    Parameters
    ----------
    sizes : sequence of int
        Channels of an image, channels of each block, classes: ``[1, 16, 32, 10]``. Each block but
        the first halves the height and the width.
    norm : str
        "batch", "instance" (with gamma and beta, but without running statistics), or "none":
        convolutions have a bias then.
    zero_gamma : bool
        Whether gamma starts at 0 in the last norm of each block, so that the block starts as its
        shortcut (P. Goyal et al., "Accurate, Large Minibatch SGD", 2017); it needs a norm.
    rng, dtype
        As in `mlp`.
    """
    layers: list[Part] = [
        Conv2d(sizes[0], sizes[1], bias=norm == "none", rng=rng, dtype=dtype),
        *norm_layers(norm, sizes[1], "relu", dtype),
    ]
    for index, c_out in enumerate(sizes[1:-1]):
        c_in, stride = (sizes[index], 2) if index else (c_out, 1)
        layers.append(
            ResBlock(
                c_in, c_out, stride=stride, norm=norm, zero_gamma=zero_gamma, rng=rng, dtype=dtype
            )
        )
    layers += [GlobalAveragePool(), Linear(sizes[-2], sizes[-1], bias=True, rng=rng, dtype=dtype)]
    return Sequential(*layers)


def norm_layers(
    norm: str, channels: int, activation: Literal["relu"] | None, dtype: DTypeLike
) -> list[Part]:
    """Build a norm and what follows it, in one layer; without a norm what follows alone."""
    match norm:
        case "batch":
            return [BatchNorm(channels, activation=activation, dtype=dtype)]
        case "instance":
            return [InstanceNorm(channels, activation=activation, affine=True, dtype=dtype)]
        case "none":
            return [ReLU()] if activation else []
        case _:
            raise ValueError(f"norm: expected batch, instance or none, got {norm!r}")


def fold(network: Container, plain: Container) -> None:
    """Fold the batch norms of a network into the layers in front of them.

    In evaluation ``plain`` then computes what ``network`` does.

    Parameters
    ----------
    network : Container
        With batch norm or without; not changed.
    plain : Container
        The same network built with ``norm="none"``, which takes over weights and biases.
    """
    targets = (leaf for leaf in plain.leaves().values() if leaf.params)
    for leaf, following in pairwise([*network.leaves().values(), None]):
        if isinstance(leaf, (Linear, Conv2d)):
            state = leaf.state_dict()
            if isinstance(following, BatchNorm):
                state["weight"], state["bias"] = following.fold_into(**state)
            next(targets).load_state_dict(state)
