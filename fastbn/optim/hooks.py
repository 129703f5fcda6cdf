"""Hooks around the steps of an optimizer."""

from math import isfinite, sqrt
from sys import float_info

from fastbn import checks
from fastbn.optim import updates
from fastbn.optim.base import Optimizer
from fastbn.optim.parameters import Decays, decays_by_name, flat


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
        self.rate: float = checks.hyper_parameter("rate", rate)
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
        rule = checks.Rule("a finite number > 0", float, lambda x: 0 < x <= float_info.max)
        self.max_norm: float = checks.hyper_parameter("max_norm", max_norm, rule)

    def __call__(self, optimizer: Optimizer) -> None:
        """Scale the gradients of the layers in ``optimizer.stepping``."""
        grads = [layer.grads[name] for layer in optimizer.stepping for name in layer.params]
        norm = sqrt(sum(updates.sum_of_squares(flat(g, g.dtype, "K")) for g in grads))
        if not isfinite(norm):
            raise FloatingPointError(f"grads: expected gradients of a finite norm, got {norm}")
        if norm > self.max_norm:
            for g in grads:
                g *= self.max_norm / norm
