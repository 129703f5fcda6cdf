"""What the pages share: trainings of the demo network, seeds, and curves with their spread."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from fastbn.demo.config import configure
from fastbn.demo.data import Data, load
from fastbn.demo.layers import Flatten, Linear
from fastbn.demo.network import Sequential
from fastbn.demo.train import DivergedError, Trainer, make_optimizer

threadpool_limits(1, user_api="blas")  # as the demo does: the same bits on any number of cores

SEEDS = range(5)
GUESSING = 0.1  # the accuracy of a network that has learned nothing of ten digits

_DIGITS = load("digits")
# No page chooses anything by held-out examples. So validation and test examples count together:
# there are 502, and one of them is 0.2%.
_HELD_OUT = tuple(map(np.concatenate, zip(_DIGITS.validation, _DIGITS.test, strict=True)))
DATA = Data(_DIGITS.train, _HELD_OUT, _HELD_OUT)

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def make_trainer(network=None, *, data=DATA, **options):
    """Return the demo's `Trainer` with these options of its configuration.

    ``network(rng)`` builds the network, in place of the one that the options describe.
    """
    config = configure({"lr_decay": "none", **options})
    trainer = Trainer(config, data)
    if network is not None:
        trainer.network = network(np.random.default_rng(config.seed))
        trainer.optimizer = make_optimizer(config, trainer.network)
    return trainer


def perceptron(rng, hidden, between, *, bias=False):
    """Build the demo's multilayer perceptron with the layers ``between(units)`` after each linear
    layer but the last.
    """
    layers = [Flatten()]
    for n_in, n_out in pairwise((64, *hidden)):
        layers += [Linear(n_in, n_out, bias=bias, rng=rng), *between(n_out)]
    return Sequential(*layers, Linear(hidden[-1], 10, bias=True, rng=rng))


def train(trainer, epochs):
    """Train for some epochs and return the held-out accuracy after each.

    From the epoch in which the loss stops being finite, it is the accuracy of guessing.
    """
    accuracies = np.full(epochs, GUESSING)
    for epoch in range(epochs):
        try:
            accuracies[epoch] = trainer.train_epoch("")["validation_accuracy"]
        except DivergedError:
            break
    return accuracies


def epochs_to(accuracy, curve):
    """Return after how many epochs a curve reaches the accuracy; infinity if it never does."""
    reached = np.flatnonzero(curve >= accuracy)
    return reached[0] + 1 if reached.size else np.inf


def panels(*titles, rows=1, height=3.2, **options):
    """Return a figure's axes, one for each title, in rows."""
    plt.rcParams.update(STYLE)
    columns = len(titles) // rows
    _, axes = plt.subplots(
        rows, columns, figsize=(8.4, height * rows), layout="constrained", squeeze=False, **options
    )
    for each, title in zip(axes.flat, titles, strict=True):
        each.set_title(title)
    return list(axes.flat) if len(titles) > 1 else axes[0, 0]


def band(axes, x, runs, label, **style):
    """Draw the mean of the runs, shape (seeds, len(x)), in a band from the lowest to the highest.

    Values that are not finite are left out.
    """
    runs = np.asarray(runs)
    [line] = axes.plot(x, runs.mean(axis=0), label=label, **style)
    low, high = runs.min(axis=0), runs.max(axis=0)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def spread(values, digits=3):
    """Return the mean of some values and their range as text."""
    low, mean, high = np.min(values), np.mean(values), np.max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
