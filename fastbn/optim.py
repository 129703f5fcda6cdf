"""Optimizers over layers, hooks around their steps, and learning-rate decay.

A layer is anything with the mappings `params` and `grads`: the same keys, NumPy arrays of the same
shapes. An optimizer changes the arrays in `params` in place.

Weight decay, in all its forms, passes over scales, shifts and biases unless told otherwise; see
`decays_by_name`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from math import cos, inf, isfinite, pi, sqrt
from operator import index
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn import _updates
from fastbn._hooks import Handle, HookList

__all__ = [
    "Adam",
    "AdamW",
    "GradientClipping",
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

Array = NDArray[Any]
Decays = Callable[[str, Array], bool]
Order = Literal["C", "F"]

# What hyper-parameters must be below; all are at least 0.
_BELOW = {
    "lr": inf,
    "weight_decay": inf,
    "eps": inf,
    "momentum": 1,
    "alpha": 1,
    "beta1": 1,
    "beta2": 1,
}


class Layer(Protocol):
    """What an optimizer asks of a layer."""

    @property
    def params(self) -> Mapping[str, Array]:
        """The parameters."""

    @property
    def grads(self) -> Mapping[str, Array]:
        """Their gradients, under the same keys."""


Layers = Layer | Iterable[Layer]


def decays_by_name(name: str, array: Array) -> bool:  # noqa: ARG001
    """Return whether weight decay applies to a parameter: not to gamma, beta, b and bias.

    Those names are meant with trailing digits too: b1, gamma2. Shapes cannot tell: the course's b
    is (n, 1), and the W of a layer with one unit is (1, n).
    """
    return re.fullmatch(r"(gamma|beta|b|bias)\d*", name) is None


class _Parameter:
    """One parameter: where to find it, what it must look like, and its state."""

    def __init__(self, at: int, layer: Layer, name: str, decays: Decays):
        if not isinstance(name, str):
            raise TypeError(f"layers[{at}].params: expected keys of type str, got {name!r}")
        self.where = f"layers[{at}].params[{name!r}]"
        self.layer = layer
        self.name = name
        self.key = f"{at}.{name}"
        # The array last seen: another one must be checked for overlap again.
        self.array = array = layer.params[name]
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            raise TypeError(
                f"{self.where}: expected an ndarray of float32 or float64, got {_kind(array)}"
            )
        self.shape = array.shape
        self.dtype = array.dtype
        # State is flat, in the memory order of the parameter.
        self.order: Order = "F" if array.flags.fnc else "C"
        self.decays = bool(decays(name, array))
        self.step = 0
        self.buffers: dict[str, Array] = {}

    def buffer(self, name: str) -> Array:
        if name not in self.buffers:
            self.buffers[name] = np.zeros(self.array.size, self.dtype)
        return self.buffers[name]

    def fetch(self) -> tuple[Array, Array]:
        """Return the arrays now in params and grads, checked."""
        p, where = self.layer.params[self.name], self.where
        if not isinstance(p, np.ndarray) or p.dtype != self.dtype:
            raise TypeError(f"{where}: expected an ndarray of {self.dtype}, got {_kind(p)}")
        if p.shape != self.shape:
            raise ValueError(
                f"{where}: expected shape {self.shape}, as when the optimizer was made, "
                f"got {p.shape}"
            )
        if not p.flags.writeable:
            raise ValueError(f"{where}: expected a writeable array, got a read-only one")
        where = where.replace(".params", ".grads", 1)
        if self.name not in self.layer.grads:
            raise ValueError(f"{where}: expected a gradient for each parameter, got none")
        g = self.layer.grads[self.name]
        if not isinstance(g, np.ndarray) or g.dtype not in (np.float32, np.float64):
            raise TypeError(f"{where}: expected an ndarray of float32 or float64, got {_kind(g)}")
        if g.shape != p.shape:
            raise ValueError(f"{where}: expected shape {p.shape}, as the parameter, got {g.shape}")
        return p, g


class Optimizer(ABC):
    """What all optimizers share: hooks, `attach`, saved state. It cannot be used by itself.

    Parameters
    ----------
    layers : iterable of layers, or one layer
        Anything with `params` and `grads`. Neither a layer nor an array may occur twice. The keys,
        shapes and dtypes of `params` are fixed from here on; an array may be replaced by another.
    decays : callable
        ``decays(name, array)`` tells for each parameter whether weight decay applies to it.

    Attributes
    ----------
    lr : float
        The learning rate. It may be set at any time, as may the other hyper-parameters.
    stepping : tuple of layers
        While a step runs, the layers that it updates; empty otherwise.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. `step` and `attach` raise them as well, for parameters
        and gradients; nothing is changed then.

    Notes
    -----
    Gradients may be float32 or float64 whatever the parameter is; they are converted to its dtype.
    Arrays are updated without copies where parameter and gradient have the same dtype and are both
    contiguous in the same order, C or Fortran.

    A copy (`copy.deepcopy`, pickle) has the state, but neither hooks nor attachment. One optimizer
    is for one thread at a time.
    """

    lr: float
    weight_decay: float

    def __init__(self, layers: Layers, decays: Decays, **numbers: float) -> None:
        self._names = tuple(numbers)
        for name, number in numbers.items():
            setattr(self, name, number)
        self._layers = _layers(layers)
        if not callable(decays):
            raise TypeError(f"decays: expected a callable, got {type(decays).__name__}")
        self._parameters = [
            {name: _Parameter(at, layer, name, decays) for name in layer.params}
            for at, layer in enumerate(self._layers)
        ]
        _refuse_overlap([(q, q.array) for group in self._parameters for q in group.values()])
        self.stepping: tuple[Layer, ...] = ()
        self._attached = False
        self._pre_hooks = HookList()
        self._post_hooks = HookList()

    def __setattr__(self, name: str, value: object) -> None:
        # Hyper-parameters are checked whoever sets them: the constructor, a user, load_state_dict.
        super().__setattr__(name, _checked(name, value))

    @property
    @abstractmethod
    def _buffers(self) -> tuple[str, ...]:
        """The names of the arrays that the state of a parameter consists of."""

    @abstractmethod
    def _update(self, q: _Parameter, p: Array, g: Array, weight_decay: float) -> None:
        """Update p, which like g is flat, contiguous and of q's dtype, and the state of q."""

    def step(self) -> None:
        """Update every parameter from its gradient.

        Raises
        ------
        RuntimeError
            If the optimizer is attached, or from inside a step.
        TypeError, ValueError
            If a parameter or gradient is missing, not an array, of a wrong shape or dtype, or a
            parameter is read-only. Nothing is changed then.
        """
        if self._attached:
            raise RuntimeError(
                "step: this optimizer is attached and updates each layer as its backward ends, "
                "a step would update twice; remove() the handle that attach() returned first"
            )
        self._step(range(len(self._layers)))

    def attach(self) -> Handle:
        """Update each layer as its backward ends, instead of by `step`.

        The layers must have ``register_grad_hook(hook)``, which has ``hook(layer)`` called after
        backward has filled `grads`, and returns a handle with ``remove()``. Those without any
        parameters need not have it.

        Returns
        -------
        Handle
            Its `remove()` detaches the optimizer again.

        Raises
        ------
        TypeError
            If a layer has no `register_grad_hook`; nothing is attached then.
        RuntimeError
            If the optimizer is attached already.
        """
        if self._attached:
            raise RuntimeError("attach: this optimizer is attached already")
        register: dict[int, Any] = {}
        for at, layer in enumerate(self._layers):
            if not self._parameters[at]:
                continue
            register[at] = getattr(layer, "register_grad_hook", None)
            if not callable(register[at]):
                raise TypeError(
                    f"layers[{at}]: expected a layer with register_grad_hook, "
                    f"got {type(layer).__name__}"
                )
        with ExitStack() as stack:
            for at, register_hook in register.items():
                stack.callback(register_hook(partial(self._step_one, at)).remove)
            self._attached = True
            stack.callback(setattr, self, "_attached", False)
            return Handle(stack.pop_all().close)

    def _step_one(self, at: int, _: Layer) -> None:
        # A user's layer may be copied with its hooks, but the copied optimizer is not attached.
        if self._attached:
            self._step([at])

    def register_step_pre_hook(self, hook: Callable[[Optimizer], object]) -> Handle:
        """Have ``hook(optimizer)`` called before each update, with the layers in `stepping`.

        The handle's `remove()` unregisters the hook.
        """
        return self._pre_hooks.register(hook)

    def register_step_post_hook(self, hook: Callable[[Optimizer], object]) -> Handle:
        """Have ``hook(optimizer)`` called after each update, with the layers in `stepping`.

        The handle's `remove()` unregisters the hook.
        """
        return self._post_hooks.register(hook)

    def _step(self, chosen: Sequence[int]) -> None:
        if self.stepping:
            raise RuntimeError("step: called from inside a step, by a hook")
        fetched = self._fetch(chosen)
        self.stepping = tuple(self._layers[at] for at in chosen)
        try:
            if self._pre_hooks:
                self._pre_hooks.run(self)
                fetched = self._fetch(chosen)
            for q, p, g in fetched:
                work = _dense(p, q.dtype, q.order)
                gradient = _dense(g, q.dtype, q.order)
                q.step += 1
                decay = self.weight_decay if q.decays else 0.0
                self._update(q, work.ravel(q.order), gradient.ravel(q.order), decay)
                if work is not p:
                    p[...] = work
            self._post_hooks.run(self)
        finally:
            self.stepping = ()

    def _fetch(self, chosen: Sequence[int]) -> list[tuple[_Parameter, Array, Array]]:
        """Return parameters with their arrays, all checked, so that an update cannot fail."""
        fetched = []
        for at in chosen:
            group = self._parameters[at]
            if self._layers[at].params.keys() != group.keys():
                raise ValueError(
                    f"layers[{at}].params: expected the keys {list(group)}, as when the optimizer "
                    f"was made, got {list(self._layers[at].params)}"
                )
            fetched += [(q, *q.fetch()) for q in group.values()]
        if any(p is not q.array for q, p, _ in fetched):
            _refuse_overlap([(q, p) for q, p, _ in fetched])
        for q, p, _ in fetched:
            q.array = p
            for name in self._buffers:
                q.buffer(name)
        return fetched

    def state_dict(self) -> dict[str, Any]:
        """Return what training needs to resume to the same bits, as a flat dict of copies.

        Returns
        -------
        dict of str to number or ndarray
            The hyper-parameters by name, and for each parameter, named by the position of its
            layer and its key, the number of updates, ``"0.W.step"``, and the arrays of its state,
            ``"0.W.m"``, in the parameter's shape and dtype. ``numpy.savez(file, **state)`` saves
            it; what ``numpy.load`` makes of the file can be passed to `load_state_dict`.
        """
        state: dict[str, Any] = {name: getattr(self, name) for name in self._names}
        for q in self._all():
            state[f"{q.key}.step"] = q.step
            for name in self._buffers:
                state[f"{q.key}.{name}"] = q.buffer(name).reshape(q.shape, order=q.order).copy()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, hyper-parameters included.

        Parameters
        ----------
        state : mapping of str to number or ndarray
            Exactly the entries that this optimizer's `state_dict` has. Numbers may be arrays
            without dimensions.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing, unknown, or of a wrong type, shape or dtype; nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        names = [f"{q.key}.{name}" for q in self._all() for name in ("step", *self._buffers)]
        expected = {*self._names, *names}
        if state.keys() != expected:
            missing, unknown = expected - state.keys(), state.keys() - expected
            raise ValueError(
                "state: expected the entries of this optimizer's state_dict(); "
                f"missing: {', '.join(sorted(missing)) or 'none'}, "
                f"unknown: {', '.join(sorted(map(str, unknown))) or 'none'}"
            )
        numbers = {name: _checked(name, state[name]) for name in self._names}
        steps = {q.key: _integer(f"{q.key}.step", state[f"{q.key}.step"]) for q in self._all()}
        arrays = {}
        for q in self._all():
            for name in self._buffers:
                key = f"{q.key}.{name}"
                arrays[key] = value = state[key]
                # "equiv" lets a file from a machine of the other byte order through.
                if not isinstance(value, np.ndarray) or not np.can_cast(
                    value.dtype, q.dtype, "equiv"
                ):
                    raise TypeError(f"{key}: expected an ndarray of {q.dtype}, got {_kind(value)}")
                if value.shape != q.shape:
                    raise ValueError(f"{key}: expected shape {q.shape}, got {value.shape}")
        for name, number in numbers.items():
            setattr(self, name, number)
        for q in self._all():
            q.step = steps[q.key]
            for name in self._buffers:
                q.buffer(name)[...] = arrays[f"{q.key}.{name}"].ravel(order=q.order)

    def _all(self) -> list[_Parameter]:
        return [q for group in self._parameters for q in group.values()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": False, "stepping": ()}


class SGD(Optimizer):
    """Gradient descent, plain, with momentum, or with Nesterov's momentum.

    With d the gradient plus weight_decay times the parameter::

        plain:     p = p - lr * d
        momentum:  u = momentum * u + d;  p = p - lr * u
        Nesterov:  u = momentum * u + d;  p = p - lr * (d + momentum * u)

    where u starts as the first d.

    Parameters
    ----------
    layers : iterable of layers, or one layer
        What to update; see `Optimizer`, also for the attributes.
    lr : float
        The learning rate.
    momentum : float
        From 0 to below 1.
    nesterov : bool
        Whether to look ahead along the momentum.
    weight_decay, decays
        L2 regularisation, and ``decays(name, array)``: which parameters it is for.

    Notes
    -----
    The state of a parameter is "velocity" (if momentum is not 0). The course has
    ``v = beta * v + (1 - beta) * g; p = p - lr * v``: its v is u times (1 - beta), so the same
    steps need lr here to be the course's times (1 - beta).

    References
    ----------
    .. [1] I. Sutskever et al., "On the importance of initialization and momentum in deep
       learning", ICML 2013, whose formulas have lr inside u; these are those of PyTorch.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> bn.grads["gamma"][...] = [1, -1]
    >>> fastbn.optim.SGD([bn], lr=0.5).step()
    >>> bn.gamma
    array([0.5, 1.5], dtype=float32)
    """

    momentum: float
    nesterov: bool

    def __init__(
        self,
        layers: Layers,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        decays: Decays = decays_by_name,
    ) -> None:
        super().__init__(
            layers,
            decays,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )
        if self.nesterov and self.momentum == 0:
            raise ValueError(f"nesterov: expected a momentum > 0 with it, got {momentum}")

    @property
    def _buffers(self) -> tuple[str, ...]:
        return ("velocity",) if self.momentum else ()

    def _update(self, q: _Parameter, p: Array, g: Array, weight_decay: float) -> None:
        if not self.momentum:
            _updates.sgd(p, g, self.lr, weight_decay)
        else:
            u = q.buffer("velocity")
            _updates.sgd_momentum(p, g, u, self.lr, self.momentum, self.nesterov, weight_decay)


class RMSprop(Optimizer):
    """RMSprop: gradients over the root of their running mean square.

    With d the gradient plus weight_decay times the parameter::

        v = alpha * v + (1 - alpha) * d^2
        p = p - lr * d / (sqrt(v) + eps)

    or with momentum ``u = momentum * u + d / (sqrt(v) + eps);  p = p - lr * u``.

    Parameters
    ----------
    layers : iterable of layers, or one layer
        What to update; see `Optimizer`, also for the attributes.
    lr : float
        The learning rate.
    alpha : float
        The weight of the past in v, from 0 to below 1.
    eps : float
        Added to the root, outside of it.
    momentum : float
        From 0 to below 1.
    weight_decay, decays
        L2 regularisation, and ``decays(name, array)``: which parameters it is for.

    Notes
    -----
    The state of a parameter is "v" and (if momentum is not 0) "velocity".

    References
    ----------
    .. [1] T. Tieleman, G. Hinton, "Lecture 6.5: RMSprop", Neural Networks for Machine Learning,
       Coursera 2012.
    """

    alpha: float
    eps: float
    momentum: float

    def __init__(
        self,
        layers: Layers,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        *,
        decays: Decays = decays_by_name,
    ) -> None:
        super().__init__(
            layers,
            decays,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
        )

    @property
    def _buffers(self) -> tuple[str, ...]:
        return ("v", "velocity") if self.momentum else ("v",)

    def _update(self, q: _Parameter, p: Array, g: Array, weight_decay: float) -> None:
        v = q.buffer("v")
        if not self.momentum:
            _updates.rmsprop(p, g, v, self.lr, self.alpha, self.eps, weight_decay)
        else:
            _updates.rmsprop_momentum(
                p,
                g,
                v,
                q.buffer("velocity"),
                self.lr,
                self.alpha,
                self.eps,
                self.momentum,
                weight_decay,
            )


class Adam(Optimizer):
    """Adam: momentum over the root of the running mean square, both corrected for their start.

    With d the gradient plus weight_decay times the parameter, at update t::

        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d^2
        p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Parameters
    ----------
    layers : iterable of layers, or one layer
        What to update; see `Optimizer`, also for the attributes.
    lr : float
        The learning rate.
    betas : pair of float
        beta1 and beta2, each from 0 to below 1; attributes of these names.
    eps : float
        Added to the root, outside of it.
    weight_decay, decays
        L2 regularisation, and ``decays(name, array)``: which parameters it is for.

    Notes
    -----
    The state of a parameter is "m" and "v". Each parameter counts its own updates, t.

    References
    ----------
    .. [1] D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015,
       https://arxiv.org/abs/1412.6980

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> optimizer = fastbn.optim.Adam([bn], lr=1e-3)
    >>> y = bn(np.random.default_rng(0).standard_normal((8, 2)))
    >>> dx = bn.backward(y - 1)
    >>> optimizer.step()
    >>> bn.beta
    array([0.001, 0.001], dtype=float32)
    """

    beta1: float
    beta2: float
    eps: float
    _decoupled: ClassVar[bool] = False

    def __init__(
        self,
        layers: Layers,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decays: Decays = decays_by_name,
    ) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas: expected a pair of numbers, got {betas!r}")
        super().__init__(
            layers,
            decays,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
        )

    @property
    def _buffers(self) -> tuple[str, ...]:
        return "m", "v"

    def _update(self, q: _Parameter, p: Array, g: Array, weight_decay: float) -> None:
        rate = self.lr / (1 - self.beta1**q.step)
        correction = 1 / sqrt(1 - self.beta2**q.step)
        keep, l2 = (1 - self.lr * weight_decay, 0.0) if self._decoupled else (1.0, weight_decay)
        _updates.adam(
            p,
            g,
            q.buffer("m"),
            q.buffer("v"),
            rate,
            self.beta1,
            self.beta2,
            correction,
            self.eps,
            l2,
            keep,
        )


class AdamW(Adam):
    """Adam with weight decay kept out of the running means.

    As `Adam`, but d is the gradient alone, and p is multiplied by 1 - lr * weight_decay first.

    Parameters
    ----------
    layers, lr, betas, eps, weight_decay, decays
        As in `Adam`.

    References
    ----------
    .. [1] I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
       https://arxiv.org/abs/1711.05101
    """

    _decoupled = True

    def __init__(
        self,
        layers: Layers,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        decays: Decays = decays_by_name,
    ) -> None:
        super().__init__(layers, lr, betas, eps, weight_decay, decays=decays)


class WeightDecay:
    """A pre-hook that adds ``rate * param`` to the gradients in place: L2 regularisation.

    Parameters
    ----------
    rate : float
        How much of the parameter is added.
    decays : callable
        ``decays(name, array)``: whether weight decay applies to the parameter.

    Examples
    --------
    >>> import fastbn
    >>> optimizer = fastbn.optim.SGD(fastbn.BatchNorm(2), lr=0.1)
    >>> handle = optimizer.register_step_pre_hook(fastbn.optim.WeightDecay(1e-4))
    """

    def __init__(self, rate: float, *, decays: Decays = decays_by_name) -> None:
        self.rate = _number("rate", rate)
        self.decays = decays

    def __call__(self, optimizer: Optimizer) -> None:
        """Add to the gradients of the layers in ``optimizer.stepping``."""
        for _, layer, name, g in _writeable_gradients(optimizer):
            if self.decays(name, layer.params[name]):
                g += self.rate * layer.params[name]


class GradientClipping:
    """A pre-hook that scales gradients in place so that their norm is at most `max_norm`.

    The norm is that of all gradients of the step together, summed in float64: of all layers in
    ``step()``, of one layer under ``attach()``.

    Parameters
    ----------
    max_norm : float
        The largest norm, > 0.

    Notes
    -----
    If the norm is Inf or NaN, the hook raises FloatingPointError: no scale would make those
    gradients usable, and leaving them would end in the parameters. It is raised before anything
    is updated or scaled, so a training loop may catch it and go on with the next minibatch.

    References
    ----------
    .. [1] R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural
       networks", ICML 2013, https://arxiv.org/abs/1211.5063
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = _number("max_norm", max_norm)
        if self.max_norm == 0:
            raise ValueError("max_norm: expected a number > 0, got 0")

    def __call__(self, optimizer: Optimizer) -> None:
        """Scale the gradients of the layers in ``optimizer.stepping``."""
        gradients = _writeable_gradients(optimizer)
        total = 0.0
        for where, _, _, g in gradients:
            order: Order = "F" if g.flags.fnc else "C"
            total += _updates.sum_of_squares(_dense(g, g.dtype, order).ravel(order))
            if not isfinite(total):
                raise FloatingPointError(
                    f"{where}: expected gradients of a finite norm, got {sqrt(total)}"
                )
        norm = sqrt(total)
        if norm > self.max_norm:
            for _, _, _, g in gradients:
                g *= self.max_norm / norm


def inverse_time_decay(lr: float, epoch: float, decay: float = 1.0) -> float:
    """Return ``lr / (1 + decay * epoch)``, the course's learning-rate decay.

    The learning rate is a pure function of the epoch, so that resumed training goes on as it was::

        optimizer.lr = inverse_time_decay(0.1, epoch)
    """
    return _number("lr", lr) / (1 + _number("decay", decay) * _number("epoch", epoch))


def exponential_decay(lr: float, epoch: float, rate: float = 0.95) -> float:
    """Return ``lr * rate**epoch``."""
    return float(_number("lr", lr) * _number("rate", rate) ** _number("epoch", epoch))


def staircase_decay(lr: float, epoch: float, factor: float = 0.5, every: int = 10) -> float:
    """Return ``lr * factor**(epoch // every)``: one step down every `every` epochs."""
    drops = _number("epoch", epoch) // _integer("every", every, least=1)
    return float(_number("lr", lr) * _number("factor", factor) ** drops)


def cosine_decay(lr: float, epoch: float, epochs: int, lr_min: float = 0.0) -> float:
    """Return the half cosine wave from `lr` at epoch 0 to `lr_min` at `epochs` and after.

    ``lr_min + (lr - lr_min) * (1 + cos(pi * epoch / epochs)) / 2``

    References
    ----------
    .. [1] I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts",
       ICLR 2017, https://arxiv.org/abs/1608.03983
    """
    lr, lr_min = _number("lr", lr), _number("lr_min", lr_min)
    if lr_min > lr:
        raise ValueError(f"lr_min: expected a number <= lr = {lr}, got {lr_min}")
    part = min(_number("epoch", epoch) / _integer("epochs", epochs, least=1), 1.0)
    return lr_min + (lr - lr_min) * (1 + cos(pi * part)) / 2


def _layers(layers: Any) -> tuple[Layer, ...]:
    alone = hasattr(layers, "params") and hasattr(layers, "grads")
    if not alone and not isinstance(layers, Iterable):
        raise TypeError(
            "layers: expected layers, objects with the mappings params and grads, "
            f"got {type(layers).__name__}"
        )
    found = (layers,) if alone else tuple(layers)
    if not found:
        raise ValueError("layers: expected at least one layer, got none")
    for at, layer in enumerate(found):
        for name in ("params", "grads"):
            if not isinstance(getattr(layer, name, None), Mapping):
                raise TypeError(
                    f"layers[{at}]: expected an object with the mappings params and grads, "
                    f"got {type(layer).__name__}"
                )
        if any(layer is other for other in found[:at]):
            raise ValueError(f"layers[{at}]: expected each layer once, got one again")
    return found


def _refuse_overlap(arrays: list[tuple[_Parameter, Array]]) -> None:
    for (q, a), (r, b) in combinations(arrays, 2):
        if np.shares_memory(a, b):
            raise ValueError(
                f"{r.where}: expected memory of its own, got that of {q.where}: "
                "it would be updated twice"
            )


def _dense(array: Array, dtype: DTypeLike, order: Order) -> Array:
    """Return the array, or a copy if its memory cannot be walked flat in the given order."""
    contiguous = array.flags.f_contiguous if order == "F" else array.flags.c_contiguous
    if contiguous and array.flags.aligned and array.dtype == dtype and type(array) is np.ndarray:
        return array
    with np.errstate(all="ignore"):  # a gradient too large for float32 becomes Inf
        return np.array(array, dtype, order=order)


def _writeable_gradients(optimizer: Optimizer) -> list[tuple[str, Layer, str, Array]]:
    gradients = [
        (f"grads[{name!r}] of {type(layer).__name__}", layer, name, layer.grads[name])
        for layer in optimizer.stepping
        for name in layer.params
    ]
    for where, _, _, g in gradients:
        if not g.flags.writeable:
            raise ValueError(f"{where}: expected a writeable array, got a read-only one")
    return gradients


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _checked(name: str, value: Any) -> Any:
    """Return the value of an attribute; raise if it is a hyper-parameter's and not allowed."""
    if name in _BELOW:
        return _number(name, value, _BELOW[name])
    if name == "nesterov":
        flag = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"nesterov: expected True or False, got {value!r}")
        return bool(flag)
    return value


def _number(name: str, value: object, below: float = inf) -> float:
    given = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    number = float(given)
    if not 0 <= number < below:
        bound = "a finite number >= 0" if below == inf else f"a number >= 0 and < {below:g}"
        raise ValueError(f"{name}: expected {bound}, got {value!r}")
    return number


def _integer(name: str, value: Any, least: int = 0) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return number
