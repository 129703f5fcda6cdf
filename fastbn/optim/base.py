"""What all optimizers share: parameters, hooks, attachment, saved state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from fastbn import checks
from fastbn.hooks import Handle, HookList
from fastbn.optim.parameters import Array, Decays, Layer, Parameter, decays_by_name, parameters_of

# What hyper-parameters have to be, by name.
RULES = {
    **dict.fromkeys(("lr", "weight_decay", "eps"), checks.FINITE),
    **dict.fromkeys(("momentum", "alpha"), checks.SHARE),
    "betas": checks.Rule("two numbers >= 0 and < 1", tuple, lambda x: len(x) == 2 and _shares(x)),
    "nesterov": checks.Rule("True or False", bool, lambda _: True),
}


@dataclass(eq=False)
class Optimizer(ABC):
    """What all optimizers share: parameters, hooks, `attach`, saved state. Not usable by itself.

    While a step runs, `stepping` has the layers that it updates, for hooks; otherwise it is empty.
    Arrays are updated without copies where parameter and gradient have the same dtype and are both
    contiguous in the same order, C or Fortran; others, float32 or float64, go through copies.
    A copied optimizer (`copy.deepcopy`, pickle) has the state, but neither hooks nor attachment.

    Parameters
    ----------
    layers : iterable of layers, or one layer
        Anything with `params` and `grads`. No memory may occur in them twice. Names, shapes and
        dtypes of the parameters are fixed from here on; an array may be replaced by another. What a
        layer names in `frozen_params`, if it has that, stays as it is.
    lr, weight_decay, and further numbers : float
        The hyper-parameters. They are attributes, and may be set at any time.
    decays : callable
        ``decays(name, array)`` tells for each parameter whether weight decay applies to it.
    """

    layers: InitVar[Layer | Iterable[Layer]]
    lr: float
    _: KW_ONLY
    weight_decay: float = 0.0
    decays: InitVar[Decays] = decays_by_name
    _buffers: ClassVar[tuple[str, ...]]  # the names of the arrays that a parameter's state has

    def __post_init__(self, layers: Layer | Iterable[Layer], decays: Decays) -> None:
        self._layers, self._parameters = parameters_of(layers, decays, self._buffers)
        self._state = {key: array for q in self._parameters for key, array in q.state.items()}
        self.stepping: tuple[Layer, ...] = ()
        self._attached = False
        self._pre_hooks, self._post_hooks = HookList(), HookList()

    def __setattr__(self, name: str, value: object) -> None:
        # Hyper-parameters are checked whoever sets them: the constructor or a user.
        known = name in RULES
        super().__setattr__(name, self._checked({name: value})[name] if known else value)

    def _checked(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Return hyper-parameters as Python's numbers; refuse wrong ones."""
        rules = {name: RULES.get(name, checks.FINITE) for name in numbers}
        return {n: checks.hyper_parameter(n, value, rules[n]) for n, value in numbers.items()}

    @abstractmethod
    def _update(self, p: Array, g: Array, state: Sequence[Array], t: int, decay: float) -> None:
        """Update p and state, flat, contiguous and of one dtype, the t-th time from 1 on."""

    def step(self) -> None:
        """Update every parameter from its gradient; a wrong array raises before any change."""
        if self._attached:
            raise RuntimeError("step: expected no attached optimizer, it would update twice")
        self._step(self._parameters, self._layers)

    def attach(self) -> Handle:
        """Update each layer as its backward ends, instead of by `step`.

        Each layer with parameters must have ``register_grad_hook(hook)``, which has ``hook(layer)``
        called after backward has filled `grads`, and returns a handle with ``remove()``. So does
        this, to detach the optimizer again.
        """
        if self._attached:
            raise RuntimeError("attach: this optimizer is attached already")
        with ExitStack() as undo:
            for at, layer in enumerate(self._layers):
                if layer.params:
                    register = getattr(layer, "register_grad_hook", None)
                    if register is None:
                        given = type(layer).__name__
                        raise TypeError(f"layers[{at}]: expected register_grad_hook, got {given}")
                    undo.callback(register(self._step_one).remove)
            self._attached = True
            undo.callback(setattr, self, "_attached", False)
            return Handle(undo.pop_all().close)

    def register_step_pre_hook(self, hook: Callable[[Optimizer], object]) -> Handle:
        """Have ``hook(optimizer)`` called before each update; `remove()` of the handle ends it."""
        return self._pre_hooks.register(hook)

    def register_step_post_hook(self, hook: Callable[[Optimizer], object]) -> Handle:
        """Have ``hook(optimizer)`` called after each update; `remove()` of the handle ends it."""
        return self._post_hooks.register(hook)

    def _step_one(self, layer: Layer) -> None:
        # A user's layer may be copied with its hooks, but the copied optimizer is not attached.
        if self._attached:
            self._step([q for q in self._parameters if q.layer is layer], (layer,))

    def _step(self, parameters: list[Parameter], layers: tuple[Layer, ...]) -> None:
        if self.stepping:
            raise RuntimeError("step: called from inside a step, by a hook")
        parameters = [q for q in parameters if not q.is_frozen()]
        arrays = [q.fetch() for q in parameters]
        self.stepping = layers
        try:
            if self._pre_hooks:
                self._pre_hooks.run(self)
                arrays = [q.fetch() for q in parameters]
            with np.errstate(over="ignore"):  # a gradient too large for float32 becomes Inf
                for q, (p, g) in zip(parameters, arrays, strict=True):
                    q.update(p, g, self._update, self.weight_decay)
            self._post_hooks.run(self)
        finally:
            self.stepping = ()

    def state_dict(self) -> dict[str, Any]:
        """Return what training needs to resume to the same bits, as a flat dict of copies.

        It has the hyper-parameters, and for the parameter W of layer 0 the number of its updates,
        "0.W.step", and arrays like "0.W.m". ``numpy.savez(file, **state)`` can save it.
        """
        numbers = {each.name: getattr(self, each.name) for each in fields(self)}
        return numbers | {key: array.copy() for key, array in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, also by way of `numpy.savez` and `numpy.load`.

        Anything missing, unknown, or of a wrong type, shape or dtype raises before any change.
        """
        names = [each.name for each in fields(self)]
        checks.state(state, [*names, *self._state], "other keys,")
        numbers = self._checked({name: state[name] for name in names})
        new = {}
        for key, array in self._state.items():
            new[key] = checks.ndarray(key, state[key], (array.dtype,), array.shape)
            if key.endswith(".step") and new[key] >= 2**63:
                raise ValueError(f"{key}: expected a number of updates, got {new[key]}")
        vars(self).update(numbers)
        for key, array in self._state.items():
            array[...] = new[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": False, "stepping": ()}


def _shares(values: Sequence[Any]) -> bool:
    return all(isinstance(x, int | float) and 0 <= x < 1 for x in values)
