"""The parameters of layers as an optimizer sees them: each with a name, a shape and a state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbn import checks

Array = NDArray[Any]
Decays = Callable[[str, Array], bool]
Update = Callable[[Array, Array, Sequence[Array], int, float], None]


class Layer(Protocol):
    """What an optimizer asks of a layer: two mappings with the same keys."""

    @property
    def params(self) -> Mapping[str, Array]: ...  # noqa: D102
    @property
    def grads(self) -> Mapping[str, Array]: ...  # noqa: D102


def decays_by_name(name: str, array: Array) -> bool:  # noqa: ARG001
    """Return whether weight decay applies to a parameter: not to gamma, beta, b and bias.

    Those names are meant with trailing digits too: b1, gamma2. Shapes cannot tell: the course's b
    is (n, 1), and the W of a layer with one unit is (1, n).
    """
    return re.fullmatch(r"(gamma|beta|b|bias)\d*", name) is None


class Parameter:
    """One parameter: where to find it, what it must look like, and its state."""

    def __init__(self, at: int, layer: Layer, name: str, decays: Decays, buffers: Sequence[str]):
        self.layer, self.name = layer, name
        self.where, self.where_grad = (f"layers[{at}].{m}[{name!r}]" for m in ("params", "grads"))
        p = checks.ndarray(self.where, layer.params[name], checks.FLOATS)
        self.shape, self.dtype, self.decays = p.shape, p.dtype, bool(decays(name, p))
        self.state: dict[str, Array] = {f"{at}.{name}.step": np.zeros((), np.uint64)}
        # In the memory order of p, so that an update can walk both flat. Zeros that no update ever
        # touches (plain SGD has no velocity) take no memory.
        order = _order(p)
        self.state |= {f"{at}.{name}.{each}": np.zeros(p.shape, p.dtype, order) for each in buffers}
        self.step, *self.buffers = self.state.values()

    def is_frozen(self) -> bool:
        """Return whether the layer wants the parameter left as it is (see `BatchNorm.freeze`)."""
        return self.name in getattr(self.layer, "frozen_params", ())

    def fetch(self) -> tuple[Array, Array]:
        """Return the arrays now in params and grads, checked, so that an update cannot fail."""
        p, g = self.layer.params.get(self.name), self.layer.grads.get(self.name)
        p = checks.ndarray(self.where, p, (self.dtype,), self.shape)
        g = checks.ndarray(self.where_grad, g, checks.FLOATS, self.shape)
        if not p.flags.writeable:
            raise ValueError(f"{self.where}: expected a writeable array, got a read-only one")
        return p, g

    def update(self, p: Array, g: Array, update: Update, weight_decay: float) -> None:
        """Have `update` change p and the state; arrays that it cannot walk flat go as copies."""
        order, targets = _order(p), (p, *self.buffers)
        new_p, *state = walked = [flat(array, self.dtype, order) for array in targets]
        self.step[...] = t = self.step.item() + 1
        decay = weight_decay if self.decays else 0.0
        update(new_p, flat(g, self.dtype, order), state, t, decay)
        for array, values in zip(targets, walked, strict=True):
            if values.flags.owndata:  # a copy
                array[...] = values.reshape(self.shape, order=order)


def parameters_of(
    layers: Any, decays: Decays, buffers: Sequence[str]
) -> tuple[tuple[Layer, ...], list[Parameter]]:
    """Return layers, one or an iterable, as a tuple, and their parameters; refuse what is none."""
    if not callable(decays):
        raise TypeError(f"decays: expected a callable, got {type(decays).__name__}")
    many = isinstance(layers, Iterable) and not hasattr(layers, "params")
    found = tuple(layers) if many else (layers,)
    if not found:
        raise ValueError("layers: expected at least one layer, got none")
    for at, layer in enumerate(found):
        if not all(isinstance(getattr(layer, n, None), Mapping) for n in ("params", "grads")):
            given = type(layer).__name__
            raise TypeError(f"layers[{at}]: expected the mappings params and grads, got {given}")
    named = [(at, layer, name) for at, layer in enumerate(found) for name in layer.params]
    parameters = [Parameter(*each, decays, buffers) for each in named]
    _refuse_shared_memory(parameters)
    return found, parameters


def _refuse_shared_memory(parameters: Iterable[Parameter]) -> None:
    """Refuse parameters and gradients that have memory in common: a step would change it twice."""
    named = [(q.where, q.layer.params[q.name]) for q in parameters]
    grads = [(q.where_grad, q.layer.grads.get(q.name), q.shape) for q in parameters]
    # A gradient of another shape only holds the place until there is one.
    named += [(at, g) for at, g, shape in grads if isinstance(g, np.ndarray) and g.shape == shape]
    reaching: list[tuple[int, int]] = []  # the ends and numbers of those that may overlap the next
    for start, end, new in sorted((*_addresses(a), at) for at, (_, a) in enumerate(named)):
        reaching = [each for each in reaching if each[0] > start]
        for _, at in reaching:  # views that interleave need not have an element in common
            if np.shares_memory(named[at][1], named[new][1]):
                first, second = (named[i][0] for i in sorted((at, new)))
                raise ValueError(f"{second}: expected memory of its own, got that of {first}")
        reaching.append((end, new))


def _addresses(array: Array) -> tuple[int, int]:
    """Return the address of an array's first byte, and of what follows its last."""
    start: int = array.__array_interface__["data"][0]
    if array.flags.forc or not array.size:
        return start, start + array.nbytes
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    return start + low, start + high + array.itemsize


def _order(array: Array) -> Literal["C", "F"]:
    """Return in which order an array lies in memory, C unless it is Fortran's alone."""
    return "F" if array.flags.fnc else "C"


def flat(array: Array, dtype: np.dtype[Any], order: Literal["C", "F", "K"]) -> Array:
    """Return the array flat, as an update takes it: a view if its memory is in that order."""
    found = np.asarray(array).ravel(order)
    return found if found.dtype == dtype and found.flags.aligned else found.astype(dtype)
