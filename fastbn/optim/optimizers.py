"""Optimizers over layers, hooks around their steps, and learning-rate decay.

A layer is anything with the mappings `params` and `grads`: the same keys, NumPy arrays of the same
shapes. An optimizer changes the arrays in `params` in place. Weight decay, in all its forms, passes
over scales, shifts and biases unless told otherwise; see `decays_by_name`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, InitVar, dataclass, field, fields
from itertools import combinations
from math import cos, inf, isfinite, pi, sqrt
from sys import float_info
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastbn.hooks import Handle, HookList
from fastbn.optim import updates

Array = NDArray[Any]
Layers: TypeAlias = "Layer | Iterable[Layer]"
Decays = Callable[[str, Array], bool]
Order = Literal["C", "F"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_FINITE = ("a finite number >= 0", float, lambda x: 0 <= x <= float_info.max)
_SHARE = ("a number >= 0 and < 1", float, lambda x: 0 <= x < 1)

# What values have to be, by name: in words, as a type, as a test. All others are _FINITE.
_RULES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], bool]]] = {
    **dict.fromkeys(("lr", "weight_decay", "eps"), _FINITE),
    **dict.fromkeys(("momentum", "alpha"), _SHARE),
    "betas": ("two numbers >= 0 and < 1", tuple, lambda x: len(x) == 2 and _shares(x)),
    "nesterov": ("True or False", bool, lambda _: True),
    "max_norm": ("a finite number > 0", float, lambda x: 0 < x <= float_info.max),
    **dict.fromkeys(("every", "epochs"), ("an integer >= 1", int, lambda x: 1 <= x < 2**63)),
}


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


class _Parameter:
    """One parameter: where to find it, what it must look like, and its state."""

    def __init__(self, at: int, layer: Layer, name: str, decays: Decays, buffers: Sequence[str]):
        self.layer, self.name = layer, name
        self.where, self.where_grad = (f"layers[{at}].{m}[{name!r}]" for m in ("params", "grads"))
        p = _array(self.where, layer.params[name], _FLOATS)
        self.shape, self.dtype, self.decays = p.shape, p.dtype, bool(decays(name, p))
        self.state: dict[str, Array] = {f"{at}.{name}.step": np.zeros((), np.uint64)}
        # In the memory order of p, so that a kernel can walk both flat. Zeros that no update ever
        # touches (plain SGD has no velocity) take no memory.
        order: Order = "F" if p.flags.fnc else "C"
        self.state |= {f"{at}.{name}.{each}": np.zeros(p.shape, p.dtype, order) for each in buffers}
        self.step, *self.buffers = self.state.values()

    def fetch(self) -> tuple[Array, Array]:
        """Return the arrays now in params and grads, checked, so that an update cannot fail."""
        p = _array(self.where, self.layer.params.get(self.name), (self.dtype,), self.shape)
        g = _array(self.where_grad, self.layer.grads.get(self.name), _FLOATS, self.shape)
        if not p.flags.writeable:
            raise ValueError(f"{self.where}: expected a writeable array, got a read-only one")
        return p, g


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
        dtypes of the parameters are fixed from here on; an array may be replaced by another.
    lr, weight_decay, and further numbers : float
        The hyper-parameters. They are attributes, and may be set at any time.
    decays : callable
        ``decays(name, array)`` tells for each parameter whether weight decay applies to it.
    """

    layers: InitVar[Layers]
    lr: float
    _: KW_ONLY
    weight_decay: float = 0.0
    decays: InitVar[Decays] = decays_by_name
    _buffers: ClassVar[tuple[str, ...]]  # the names of the arrays that a parameter's state has

    def __post_init__(self, layers: Layers, decays: Decays) -> None:
        if not callable(decays):
            raise TypeError(f"decays: expected a callable, got {type(decays).__name__}")
        self._layers = _layers(layers)
        self._parameters = [
            _Parameter(at, layer, name, decays, self._buffers)
            for at, layer in enumerate(self._layers)
            for name in layer.params
        ]
        arrays = [(q.where, q.layer.params[q.name]) for q in self._parameters]
        # A gradient of another shape only holds the place until there is one.
        grads = [(q.where_grad, q.layer.grads.get(q.name), q.shape) for q in self._parameters]
        arrays += [(at, g) for at, g, shape in grads if g is not None and np.shape(g) == shape]
        for (first, a), (second, b) in combinations(arrays, 2):
            if np.shares_memory(a, b):
                raise ValueError(f"{second}: expected memory of its own, got that of {first}")
        self._state = {key: array for q in self._parameters for key, array in q.state.items()}
        self.stepping: tuple[Layer, ...] = ()
        self._attached = False
        self._pre_hooks, self._post_hooks = HookList(), HookList()

    def __setattr__(self, name: str, value: object) -> None:
        # Hyper-parameters are checked whoever sets them: the constructor, a user, load_state_dict.
        super().__setattr__(name, _checked(name, value) if name in _RULES else value)

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

    def _step(self, parameters: list[_Parameter], layers: tuple[Layer, ...]) -> None:
        if self.stepping:
            raise RuntimeError("step: called from inside a step, by a hook")
        arrays = [q.fetch() for q in parameters]
        self.stepping = layers
        try:
            if self._pre_hooks:
                self._pre_hooks.run(self)
                arrays = [q.fetch() for q in parameters]
            with np.errstate(over="ignore"):  # a gradient too large for float32 becomes Inf
                for q, (p, g) in zip(parameters, arrays, strict=True):
                    self._update_one(q, p, g)
            self._post_hooks.run(self)
        finally:
            self.stepping = ()

    def _update_one(self, q: _Parameter, p: Array, g: Array) -> None:
        order: Order = "F" if p.flags.fnc else "C"
        targets = (p, *q.buffers)
        flat = [_flat(array, q.dtype, order) for array in targets]
        q.step[...] = t = q.step.item() + 1
        decay = self.weight_decay if q.decays else 0.0
        self._update(flat[0], _flat(g, q.dtype, order), flat[1:], t, decay)
        for array, values in zip(targets, flat, strict=True):
            if values.flags.owndata:  # a copy
                array[...] = values.reshape(q.shape, order=order)

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
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        names = [each.name for each in fields(self)]
        expected = {*names, *self._state}
        if state.keys() != expected:
            missing = ", ".join(sorted(expected - state.keys())) or "none"
            unknown = ", ".join(map(str, state.keys() - expected)) or "none"
            raise ValueError(f"state: expected other keys, missing: {missing}, unknown: {unknown}")
        numbers = {name: _checked(name, state[name]) for name in names}
        arrays = [(a, _array(k, state[k], [a.dtype], a.shape)) for k, a in self._state.items()]
        for q in self._parameters:
            key = next(iter(q.state))
            if state[key] >= 2**63:
                raise ValueError(f"{key}: expected a number of updates, got {state[key]}")
        vars(self).update(numbers)
        for array, values in arrays:
            array[...] = values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": False, "stepping": ()}


@dataclass(eq=False)
class SGD(Optimizer):
    """Gradient descent, plain, with momentum, or with Nesterov's momentum.

    With d the gradient plus weight_decay times the parameter::

        plain:     p = p - lr * d
        momentum:  u = momentum * u + d;  p = p - lr * u
        Nesterov:  u = momentum * u + d;  p = p - lr * (d + momentum * u)

    Parameters
    ----------
    layers, lr, weight_decay, decays
        See `Optimizer`.
    momentum : float
        From 0 to below 1. The course multiplies d by 1 - momentum, and needs a larger lr for that.
    nesterov : bool
        Whether to look ahead along the momentum, which must not be 0 then.

    References
    ----------
    .. [1] Ilya Sutskever et al., ICML 2013, whose formulas have lr inside u; these are PyTorch's.
    """

    momentum: float = 0.0
    nesterov: bool = False
    _buffers = ("velocity",)

    def __post_init__(self, layers: Layers, decays: Decays) -> None:
        super().__post_init__(layers, decays)
        if self.nesterov and not self.momentum:
            raise ValueError(f"nesterov: expected a momentum > 0 with it, got {self.momentum:g}")

    def _update(self, p: Array, g: Array, state: Sequence[Array], _: int, decay: float) -> None:
        if self.momentum:
            updates.sgd_momentum(p, g, state[0], self.lr, self.momentum, self.nesterov, decay)
        else:
            updates.sgd(p, g, self.lr, decay)


@dataclass(eq=False)
class RMSprop(Optimizer):
    """RMSprop: gradients over the root of their running mean square.

    With d the gradient plus weight_decay times the parameter::

        v = alpha * v + (1 - alpha) * d^2
        u = momentum * u + d / (sqrt(v) + eps);  p = p - lr * u

    Parameters
    ----------
    layers, lr, alpha, eps, momentum, weight_decay, decays
        See `Optimizer` and the formula; alpha and momentum are from 0 to below 1.

    References
    ----------
    .. [1] Tijmen Tieleman, Geoffrey Hinton, "Lecture 6.5: RMSprop", Coursera 2012.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    _buffers = ("v", "velocity")

    def _update(self, p: Array, g: Array, state: Sequence[Array], _: int, decay: float) -> None:
        (v, u), numbers = state, (self.lr, self.alpha, self.eps)
        if self.momentum:
            updates.rmsprop_momentum(p, g, v, u, *numbers, self.momentum, decay)
        else:
            updates.rmsprop(p, g, v, *numbers, decay)


@dataclass(eq=False)
class Adam(Optimizer):
    """Adam: momentum over the root of the running mean square, both corrected for their start.

    With d the gradient plus weight_decay times the parameter, at the parameter's update t::

        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Parameters
    ----------
    layers, lr, betas, eps, weight_decay, decays
        See `Optimizer` and the formula; betas are beta1 and beta2, from 0 to below 1.

    References
    ----------
    .. [1] Diederik P. Kingma, Jimmy Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    _buffers = ("m", "v")
    _decoupled: ClassVar[bool] = False

    def _update(self, p: Array, g: Array, state: Sequence[Array], t: int, decay: float) -> None:
        (m, v), (beta1, beta2) = state, self.betas
        rate, correction = self.lr / (1 - beta1**t), 1 / sqrt(1 - beta2**t)
        l2, keep = (0.0, 1 - self.lr * decay) if self._decoupled else (decay, 1.0)
        updates.adam(p, g, m, v, rate, beta1, beta2, correction, self.eps, l2, keep)


@dataclass(eq=False)
class AdamW(Adam):
    """Adam with weight decay kept out of the running means.

    As `Adam`, with the same parameters, but d is the gradient alone, and p is multiplied by
    1 - lr * weight_decay first.

    References
    ----------
    .. [1] Ilya Loshchilov, Frank Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101
    """

    weight_decay: float = field(default=0.01, kw_only=True)
    _decoupled = True


class WeightDecay:
    """A pre-hook that adds ``rate * param`` to the gradients in place: L2 regularisation.

    Parameters
    ----------
    rate : float
        How much of the parameter is added, >= 0.
    decays : callable
        ``decays(name, array)``: whether weight decay applies to the parameter.
    """

    def __init__(self, rate: float, *, decays: Decays = decays_by_name) -> None:
        self.rate: float = _checked("rate", rate)
        self.decays = decays

    def __call__(self, optimizer: Optimizer) -> None:
        """Add to the gradients of the layers in ``optimizer.stepping``."""
        for layer in optimizer.stepping:
            for name, p in layer.params.items():
                if self.decays(name, p):
                    g = layer.grads[name]
                    g += self.rate * p


class GradientClipping:
    """A pre-hook that scales gradients in place so that their norm is at most `max_norm`.

    The norm is that of all gradients of the step together, summed in float64: of all layers in
    ``step()``, of one layer under ``attach()``. If it is Inf or NaN, FloatingPointError is raised
    before anything is changed, so a training loop may catch it and go on with the next minibatch.
    From R. Pascanu et al., ICML 2013, https://arxiv.org/abs/1211.5063.

    Parameters
    ----------
    max_norm : float
        The largest norm, > 0.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm: float = _checked("max_norm", max_norm)

    def __call__(self, optimizer: Optimizer) -> None:
        """Scale the gradients of the layers in ``optimizer.stepping``."""
        grads = [layer.grads[name] for layer in optimizer.stepping for name in layer.params]
        norm = sqrt(sum(updates.sum_of_squares(_flat(g, g.dtype, "K")) for g in grads))
        if not isfinite(norm):
            raise FloatingPointError(f"grads: expected gradients of a finite norm, got {norm}")
        if norm > self.max_norm:
            for g in grads:
                g *= self.max_norm / norm


def inverse_time_decay(lr: float, epoch: float, decay: float = 1.0) -> float:
    """Return ``lr / (1 + decay * epoch)``, the course's learning-rate decay.

    A pure function of the epoch, as all of these: set ``optimizer.lr`` to it before each epoch.

    >>> inverse_time_decay(0.2, epoch=3)
    0.05
    """
    return float(_checked("lr", lr) / (1 + _checked("decay", decay) * _checked("epoch", epoch)))


def exponential_decay(lr: float, epoch: float, rate: float = 0.95) -> float:
    """Return ``lr * rate**epoch``."""
    return _grown(_checked("lr", lr), "rate", rate, _checked("epoch", epoch))


def staircase_decay(lr: float, epoch: float, factor: float = 0.5, every: int = 10) -> float:
    """Return ``lr * factor**(epoch // every)``: one step down every `every` epochs."""
    drops = _checked("epoch", epoch) // _checked("every", every)
    return _grown(_checked("lr", lr), "factor", factor, drops)


def cosine_decay(lr: float, epoch: float, epochs: int, lr_min: float = 0.0) -> float:
    """Return the half cosine wave from `lr` at epoch 0 to `lr_min` at `epochs` and after.

    ``lr_min + (lr - lr_min) * (1 + cos(pi * epoch / epochs)) / 2``, from I. Loshchilov, F. Hutter,
    "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    lr, lr_min = _checked("lr", lr), _checked("lr_min", lr_min)
    part = min(_checked("epoch", epoch) / _checked("epochs", epochs), 1.0)
    return lr_min + (lr - lr_min) * (1 + cos(pi * part)) / 2


def _grown(lr: float, name: str, factor: float, times: float) -> float:
    try:
        grown = float(lr * _checked(name, factor) ** times)
    except OverflowError:
        grown = inf
    if grown == inf:
        raise ValueError(f"{name}: expected one whose power {times:g} is finite, got {factor}")
    return grown


def _layers(layers: Any) -> tuple[Layer, ...]:
    many = isinstance(layers, Iterable) and not hasattr(layers, "params")
    found = tuple(layers) if many else (layers,)
    if not found:
        raise ValueError("layers: expected at least one layer, got none")
    for at, layer in enumerate(found):
        if not all(isinstance(getattr(layer, n, None), Mapping) for n in ("params", "grads")):
            given = type(layer).__name__
            raise TypeError(f"layers[{at}]: expected the mappings params and grads, got {given}")
    return found


def _flat(array: Array, dtype: np.dtype[Any], order: Order | Literal["K"]) -> Array:
    """Return the array flat, as a kernel takes it: a view if its memory is in that order."""
    flat = np.asarray(array).ravel(order)
    return flat if flat.dtype == dtype and flat.flags.aligned else flat.astype(dtype)


def _array(name: str, value: Any, dtypes: Sequence[Any], shape: Any = None) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes:
        given = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name}: expected ndarray of {' or '.join(map(str, dtypes))}, got {given}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
    return value


def _shares(values: Iterable[Any]) -> bool:
    return all(isinstance(x, int | float) and 0 <= x < 1 for x in values)


def _checked(name: str, value: Any) -> Any:
    """Return a value, which may be NumPy's, as Python's, if it is as its name's rule has it."""
    words, kind, holds = _RULES.get(name, _FINITE)
    given = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    fits = type(given) is kind or (type(given), kind) in {(int, float), (list, tuple)}
    if not fits or not holds(given):
        huge = type(given) is int and abs(given) >= 2**63  # Python may refuse to print it
        got = "an integer of 64 bits or more" if huge else repr(value)
        raise (ValueError if fits else TypeError)(f"{name}: expected {words}, got {got}")
    return kind(given)
