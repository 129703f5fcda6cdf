"""
Train and test
==============

In training, batch norm uses the statistics of the minibatch. In evaluation it uses running
statistics: averages in which old minibatches fade, ``running = (1 - momentum) running + momentum
new``. This page compares them with the exact statistics, and shows what a bad momentum does.
:func:`fastbn.update_statistics` computes the exact ones: it sends the whole training set through
the network once more and pools the statistics of its minibatches.
"""

from copy import deepcopy

import numpy as np
from common import DATA, SEEDS, band, make_trainer, panels, spread, train

from fastbn import BatchNorm, update_statistics

HIDDEN, EPOCHS = (64, 64, 64), 10
MOMENTA = (0.001, 0.01, 0.1, 1.0)


def norms_of(network):
    return [layer for layer in network.leaves().values() if isinstance(layer, BatchNorm)]


def with_exact(network):
    """Return a copy of the network with the exact statistics of the training set."""
    network = deepcopy(network)
    network.train()
    batches = np.array_split(DATA.train[0], 10)
    update_statistics(norms_of(network), batches, forward=network.forward)
    return network


def run(momentum, seed):
    """Train; return per epoch the accuracy with running and with exact statistics.

    The third value is how far the running means of the last norm are from the exact ones, in
    standard deviations.
    """
    trainer = make_trainer(hidden=HIDDEN, lr=0.01, seed=seed)
    for norm in norms_of(trainer.network):
        norm.momentum = momentum
    running, exact, distances = [], [], []
    for _ in range(EPOCHS):
        running.append(train(trainer, 1)[0])
        one, other = norms_of(trainer.network)[-1], with_exact(trainer.network)
        last = norms_of(other)[-1]
        distances.append(
            np.mean(abs(one.running_mean - last.running_mean) / np.sqrt(last.running_var))
        )
        trainer.network, kept = other, trainer.network
        exact.append(trainer.evaluate(DATA.test)[1])
        trainer.network = kept
    return running, exact, distances


results = {momentum: np.array([run(momentum, seed) for seed in SEEDS]) for momentum in MOMENTA}

# %%
# Momentum
# --------
#
# Running statistics take no part in training, so all of these are the same trainings, to the bit.
# They differ in evaluation alone.

axes = panels("held-out accuracy", "distance from the exact means")
epochs = range(1, EPOCHS + 1)
for momentum, runs in results.items():
    for each, values in zip(axes, (runs[:, 0], runs[:, 2]), strict=True):
        band(each, epochs, values, f"momentum {momentum:g}")
band(axes[0], epochs, results[0.1][:, 1], "exact", color="black", linestyle="--")
axes[0].set_ylim(0.3, 1)
axes[0].legend(loc="lower right", ncols=2)
axes[1].set(yscale="log", ylabel="standard deviations")
for each in axes:
    each.set_xlabel("epoch")

first = {momentum: runs[:, 0, 0].mean() for momentum, runs in results.items()}
end = {momentum: runs[:, 0, -3:].mean() for momentum, runs in results.items()}
distance = {momentum: runs[:, 2, -3:].mean() for momentum, runs in results.items()}
for momentum, runs in results.items():
    print(
        f"momentum {momentum:<5g}  first epoch {spread(runs[:, 0, 0])},"
        f" last three {spread(runs[:, 0, -3:].mean(axis=1))};  off by {distance[momentum]:.2f}"
    )
exact = results[0.1][:, 1]
print(
    f"exact           first epoch {spread(exact[:, 0])},"
    f" last three {spread(exact[:, -3:].mean(axis=1))}"
)

# %%
# Too small a momentum is the worse mistake. After the 40 minibatches of an epoch the statistics are
# still mostly the zeros and ones of the start, and later they belong to a network of long ago. At 1
# they are the statistics of the last minibatch alone, as noisy as in training. The default lies
# between the two and loses next to nothing to exact statistics. If momentum was chosen badly, one
# pass of :func:`fastbn.update_statistics` repairs the trained network.

assert (results[0.001][:, 1] == results[1.0][:, 1]).all()  # the same trainings
assert end[0.001] < end[0.01] < end[0.1]
assert end[1.0] < end[0.1]
assert first[0.001] < first[0.01] < first[0.1]
assert exact[:, -3:].mean() - end[0.1] < 0.01

# %%
# Why the start matters
# ---------------------
#
# After n minibatches the start has the weight (1 - momentum) to the power of n. This explains the
# distances above at first. Then the network moves more slowly, and all distances shrink.

steps = len(DATA.train[0]) // 32
for momentum in MOMENTA:
    left = (1 - momentum) ** steps
    print(f"momentum {momentum:<5g}  weight of the start after an epoch of {steps}: {left:.2%}")
