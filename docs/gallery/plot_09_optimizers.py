"""
Four optimizers on gamma and beta
=================================

Gamma and beta are parameters like any other. Gradient descent, momentum, RMSprop and Adam train
them as they train weights. Here all four do so, first together with the weights and then alone.
"""

import numpy as np
from common import SEEDS, band, make_trainer, panels, spread, train

from fastbn import BatchNorm
from fastbn.demo.config import LR
from fastbn.demo.network import Sequential
from fastbn.demo.train import make_optimizer

HIDDEN, EPOCHS = (256, 256), 15


def run(optimizer, seed, *, alone):
    """Train; return the accuracies, and gamma and beta of the first norm after each step.

    Alone, gamma and beta need higher learning rates than the demo's: ten times as high here.
    """
    lr = 10 * LR[optimizer] if alone else LR[optimizer]
    trainer = make_trainer(hidden=HIDDEN, optimizer=optimizer, lr=lr, seed=seed)
    norms = [n for n in trainer.network.leaves().values() if isinstance(n, BatchNorm)]
    if alone:
        trainer.optimizer = make_optimizer(trainer.config, Sequential(*norms))
    way = [[norms[0].gamma.copy(), norms[0].beta.copy()]]
    trainer.optimizer.register_step_post_hook(
        lambda _: way.append([norms[0].gamma.copy(), norms[0].beta.copy()])
    )
    return train(trainer, EPOCHS), np.array(way)


def compare(alone):
    """Train with each optimizer, draw, and return end accuracies and the ways."""
    axes = panels("accuracy", "gamma, distance from 1", "beta, distance from 0")
    ends, ways = {}, {}
    for optimizer in LR:
        curves, way = zip(*(run(optimizer, seed, alone=alone) for seed in SEEDS), strict=True)
        ends[optimizer], ways[optimizer] = [curve[-1] for curve in curves], np.array(way)
        band(axes[0], range(1, EPOCHS + 1), curves, optimizer)
        # (seeds, steps, 2, channels): the mean over the channels of how far they are.
        distances = abs(ways[optimizer] - ways[optimizer][:, :1]).mean(axis=-1)
        for each, runs in zip(axes[1:], np.moveaxis(distances, 2, 0), strict=True):
            band(each, range(runs.shape[1]), runs, optimizer)
            each.set_xlabel("step")
    axes[0].set(xlabel="epoch", ylabel="held-out accuracy")
    axes[1].legend()
    for optimizer, way in ways.items():
        gone = abs(way[:, -1] - way[:, 0]).mean(axis=(0, 2))
        path = abs(np.diff(way, axis=1)).sum(axis=1).mean(axis=(0, 2))
        print(
            f"{optimizer:8}  accuracy {spread(ends[optimizer])}"
            f"  gamma went {gone[0]:.2f} away on a path of {path[0]:.2f},"
            f" beta {gone[1]:.2f} on {path[1]:.2f}"
        )
    return ends, ways


# %%
# With the weights
# ----------------
#
# The optimizers train everything, at the demo's default learning rates.

ends, ways = compare(alone=False)

# %%
# All four end within two hundredths of each other. They move gamma and beta by a few hundredths
# only: the weights do the work. Momentum and Adam average their gradients. Gradient descent and
# RMSprop do not, and go back and forth more: their paths are longer and lead hardly further.

means = [np.mean(values) for values in ends.values()]
assert max(means) - min(means) < 0.02
for way in ways.values():
    assert abs(way[:, -1] - way[:, 0]).mean() < 0.1


def path(optimizer):
    return abs(np.diff(ways[optimizer], axis=1)).sum()


assert path("momentum") < path("sgd")
assert path("adam") < path("rmsprop")

# %%
# Alone
# -----
#
# Now all weights stay random, as they were drawn, the last layer's too. The optimizers train gamma
# and beta of the two norms alone.

ends, ways = compare(alone=True)
leaves = make_trainer(hidden=HIDDEN).network.leaves().values()
sizes = {leaf: sum(p.size for p in leaf.params.values()) for leaf in leaves}
trained = sum(size for leaf, size in sizes.items() if isinstance(leaf, BatchNorm))
print(f"trained: {trained:,} of {sum(sizes.values()):,} parameters")

# %%
# A hundredth of the parameters is enough for about 95%, with random weights around them. (Frankle
# et al. found the same in large networks, "Training BatchNorm and Only BatchNorm", 2020.) Gamma and
# beta move far here. Again the four agree with each other, and the two that average take the
# shorter way.

for optimizer in LR:
    assert np.mean(ends[optimizer]) > 0.92
    assert abs(ways[optimizer][:, -1] - ways[optimizer][:, 0]).mean() > 0.3
assert path("momentum") < path("sgd")
assert path("adam") < path("rmsprop")
