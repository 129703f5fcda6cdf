"""Learning rates that fall from epoch to epoch."""

from math import cos, inf, pi

from fastbn.checks import Rule
from fastbn.checks import hyper_parameter as checked

COUNT = Rule("an integer >= 1", int, lambda x: 1 <= x < 2**63)


def inverse_time_decay(lr: float, epoch: float, decay: float = 1.0) -> float:
    """Return ``lr / (1 + decay * epoch)``, the course's learning-rate decay.

    A pure function of the epoch, as all of these: set ``optimizer.lr`` to it before each epoch.

    >>> inverse_time_decay(0.2, epoch=3)
    0.05
    """
    return float(checked("lr", lr) / (1 + checked("decay", decay) * checked("epoch", epoch)))


def exponential_decay(lr: float, epoch: float, rate: float = 0.95) -> float:
    """Return ``lr * rate**epoch``."""
    return _grown(checked("lr", lr), "rate", rate, checked("epoch", epoch))


def staircase_decay(lr: float, epoch: float, factor: float = 0.5, every: int = 10) -> float:
    """Return ``lr * factor**(epoch // every)``: one step down every `every` epochs."""
    drops = checked("epoch", epoch) // checked("every", every, COUNT)
    return _grown(checked("lr", lr), "factor", factor, drops)


def cosine_decay(lr: float, epoch: float, epochs: int, lr_min: float = 0.0) -> float:
    """Return the half cosine wave from `lr` at epoch 0 to `lr_min` at `epochs` and after.

    ``lr_min + (lr - lr_min) * (1 + cos(pi * epoch / epochs)) / 2``, from I. Loshchilov, F. Hutter,
    "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    lr, lr_min = checked("lr", lr), checked("lr_min", lr_min)
    part = min(checked("epoch", epoch) / checked("epochs", epochs, COUNT), 1.0)
    return lr_min + (lr - lr_min) * (1 + cos(pi * part)) / 2


def _grown(lr: float, name: str, factor: float, times: float) -> float:
    try:
        grown = float(lr * checked(name, factor) ** times)
    except OverflowError:
        grown = inf
    if grown == inf:
        raise ValueError(f"{name}: expected one whose power {times:g} is finite, got {factor}")
    return grown
