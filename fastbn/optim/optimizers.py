"""The optimizers: what each has for hyper-parameters and state, and how it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

from fastbn.optim import updates
from fastbn.optim.base import Optimizer
from fastbn.optim.parameters import Array


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

    def _checked(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        new = super()._checked(numbers)
        momentum, nesterov = (new.get(n, getattr(self, n)) for n in ("momentum", "nesterov"))
        if nesterov and not momentum:
            raise ValueError(f"nesterov: expected a momentum > 0 with it, got {momentum:g}")
        return new

    def _update(self, p: Array, g: Array, state: Sequence[Array], _: int, decay: float) -> None:
        updates.sgd(p, g, state[0], self.lr, self.momentum, self.nesterov, decay)


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
        v, u = state
        updates.rmsprop(p, g, v, u, self.lr, self.alpha, self.eps, self.momentum, decay)


@dataclass(eq=False)
class Adam(Optimizer):
    """Adam: momentum divided by the root mean square of gradients, both with bias correction.

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
