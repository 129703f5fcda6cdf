"""Layers put together: in a row, in residual blocks, as whole networks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastbn import BatchNorm
from fastbn.demo.layers import Array, Conv2d, Flatten, GlobalAveragePool, Layer, Linear, ReLU


class Container(Layer):
    """A layer made of others, kept by name in ``children``."""

    def __init__(self, **children: Layer | BatchNorm) -> None:
        super().__init__()
        self.children = children

    def leaves(self) -> dict[str, Layer | BatchNorm]:
        """Return the innermost layers by dotted name; an optimizer takes their ``values()``."""
        found: dict[str, Layer | BatchNorm] = {}
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
        expected, given = _describe(self.state_dict()), _describe(state)
        for name in sorted(expected.keys() | given.keys()):
            if given.get(name) != expected.get(name):
                wanted, got = expected.get(name, "no such entry"), given.get(name, "nothing")
                raise ValueError(f"{name}: expected {wanted}, got {got}")
        for name, leaf in self.leaves().items():
            leaf.load_state_dict({key: state[f"{name}.{key}"] for key in leaf.state_dict()})


class Sequential(Container):
    """Layers one after the other; without any, y = x."""

    def __init__(self, *layers: Layer | BatchNorm) -> None:
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
    """y = relu(main(x) + shortcut(x)), from (m, C, H, W) to (m, O, H / stride, W / stride).

    ``main`` is convolution, batch norm, ReLU, convolution, batch norm. ``shortcut`` is x itself, or
    where the shapes differ a 1 x 1 convolution and batch norm. Parameters as in `Conv2d`, and
    ``norm`` as in `mlp`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        stride: int = 1,
        norm: bool,
        rng: np.random.Generator,
        dtype: DTypeLike = np.float32,
    ) -> None:
        shortcut = Sequential()
        main = Sequential(
            *conv_norm(c_in, c_out, 3, stride, norm, rng, dtype),
            ReLU(),
            *conv_norm(c_out, c_out, 3, 1, norm, rng, dtype),
        )
        if (c_in, 1) != (c_out, stride):
            shortcut = Sequential(*conv_norm(c_in, c_out, 1, stride, norm, rng, dtype))
        super().__init__(main=main, shortcut=shortcut, relu=ReLU())

    def forward(self, x: Array) -> Array:
        """Compute y."""
        children = self.children
        return children["relu"].forward(
            children["main"].forward(x) + children["shortcut"].forward(x)
        )

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, the sum over both ways from x to y."""
        children = self.children
        dsum = children["relu"].backward(dy)
        return children["main"].backward(dsum) + children["shortcut"].backward(dsum)


def mlp(
    sizes: Sequence[int],
    *,
    norm: bool,
    rng: np.random.Generator,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Build a multilayer perceptron; between two linear layers stand batch norm and ReLU.

    Parameters
    ----------
    sizes : sequence of int
        Values of an input, units of each hidden layer, classes: ``[64, 128, 10]``.
    norm : bool
        Whether there is batch norm. Without it the linear layers have a bias instead.
    rng : numpy.random.Generator
        Draws the weights.
    dtype : data-type
    """
    layers: list[Layer | BatchNorm] = [Flatten()]
    for n_in, n_out in pairwise(sizes[:-1]):
        layers.append(Linear(n_in, n_out, bias=not norm, rng=rng, dtype=dtype))
        if norm:
            layers.append(BatchNorm(n_out, dtype=dtype))
        layers.append(ReLU())
    layers.append(Linear(sizes[-2], sizes[-1], bias=True, rng=rng, dtype=dtype))
    return Sequential(*layers)


def resnet(
    sizes: Sequence[int],
    *,
    norm: bool,
    rng: np.random.Generator,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Build a residual network: a convolution, residual blocks, a global mean, a linear layer.

    Parameters
    ----------
    sizes : sequence of int
        Channels of an image, channels of each block, classes: ``[1, 16, 32, 10]``. Each block but
        the first halves the height and the width.
    norm, rng, dtype
        As in `mlp`.
    """
    layers: list[Layer | BatchNorm] = [
        *conv_norm(sizes[0], sizes[1], 3, 1, norm, rng, dtype),
        ReLU(),
    ]
    for index, c_out in enumerate(sizes[1:-1]):
        c_in, stride = (sizes[index], 2) if index else (c_out, 1)
        layers.append(ResBlock(c_in, c_out, stride=stride, norm=norm, rng=rng, dtype=dtype))
    layers += [GlobalAveragePool(), Linear(sizes[-2], sizes[-1], bias=True, rng=rng, dtype=dtype)]
    return Sequential(*layers)


def conv_norm(
    c_in: int,
    c_out: int,
    kernel: int,
    stride: int,
    norm: bool,
    rng: np.random.Generator,
    dtype: DTypeLike,
) -> list[Layer | BatchNorm]:
    """Build a convolution with batch norm after it, or without batch norm, with a bias."""
    conv = Conv2d(c_in, c_out, kernel, stride=stride, bias=not norm, rng=rng, dtype=dtype)
    return [conv, BatchNorm(c_out, dtype=dtype)] if norm else [conv]


def _describe(state: Mapping[str, Any]) -> dict[str, str]:
    """Return shape and type of each entry."""
    arrays = {name: np.asarray(value) for name, value in state.items()}
    return {name: f"{array.dtype} of shape {array.shape}" for name, array in arrays.items()}
