"""
Gamma, beta, both, none
=======================

Batch norm multiplies the normalised values by gamma and adds beta, and it learns both. The notes
that fastbn comes from call the bias term the secret sauce. Here a hook holds one or both at their
start, 1 and 0: it sets their gradients to zero before the optimizer reads them.
"""

import numpy as np
from common import band, make_trainer, panels, spread, train

from fastbn import BatchNorm

EPOCHS, SEEDS, WIDTHS = 25, range(6), (4, 8, 64)
HELD = {"both": (), "gamma alone": ("beta",), "beta alone": ("gamma",), "none": ("gamma", "beta")}


def trained(width, held, seed):
    """Train a network of two hidden layers; return it, the accuracies and the training loss."""
    trainer = make_trainer(hidden=(width, width), lr=0.01, seed=seed)
    for layer in trainer.network.leaves().values():
        if isinstance(layer, BatchNorm):
            layer.register_grad_hook(lambda norm: [norm.grads[name].fill(0) for name in held])
    accuracies = train(trainer, EPOCHS)
    return trainer.network, accuracies, trainer.evaluate(trainer.data.train)[0]


results = {
    (width, name): [trained(width, held, seed) for seed in SEEDS]
    for width in WIDTHS
    for name, held in HELD.items()
}

# %%
# Three widths
# ------------

axes = panels(*(f"{width} units in each hidden layer" for width in WIDTHS))
accuracy, loss = {}, {}
for (width, name), runs in results.items():
    _, accuracies, losses = zip(*runs, strict=True)
    band(axes[WIDTHS.index(width)], range(1, EPOCHS + 1), accuracies, name)
    accuracy[width, name], loss[width, name] = np.mean(accuracies, axis=0)[-1], np.mean(losses)
    print(
        f"{width:2} units, {name:11}  accuracy {spread([each[-1] for each in accuracies])}"
        f"  training loss {spread(losses, 4)}"
    )
for each, low in zip(axes, (0.5, 0.8, 0.9), strict=True):
    each.set(ylim=(low, 1), xlabel="epoch")
axes[0].set_ylabel("held-out accuracy")
axes[2].legend(loc="lower right")

# %%
# In the narrow network beta is worth far more than gamma: beta alone does nearly as well as both,
# and gamma alone does nearly nothing. Without beta, ReLU cuts each unit at its own mean, so that
# the unit is on for about half of the examples, and four units are too few to make up for that.
# With eight units the difference nearly vanishes. With 64 it is gone: the bands lie on each other,
# and networks with neither learn the training examples just as well. So gamma and beta matter in
# narrow networks. Elsewhere the next linear layer can do what gamma does, and many units together
# can do what beta does.

assert accuracy[4, "beta alone"] > accuracy[4, "gamma alone"] + 0.05
assert abs(accuracy[4, "both"] - accuracy[4, "beta alone"]) < 0.03
assert abs(accuracy[4, "gamma alone"] - accuracy[4, "none"]) < 0.05
assert abs(accuracy[8, "both"] - accuracy[8, "none"]) < 0.03
for name in HELD:
    assert abs(accuracy[64, name] - accuracy[64, "both"]) < 0.01
assert loss[64, "none"] < 0.02

# %%
# What they become
# ----------------
#
# These are gamma and beta of all layers and seeds at the end, where both were trained.

axes = panels("gamma", "beta", height=2.8)
for width in (4, 64):
    norms = [
        layer
        for network, *_ in results[width, "both"]
        for layer in network.leaves().values()
        if isinstance(layer, BatchNorm)
    ]
    for each, name in zip(axes, ("gamma", "beta"), strict=True):
        values = np.concatenate([norm.params[name] for norm in norms])
        each.hist(values, bins=20, density=True, alpha=0.6, label=f"{width} units")
        each.set_xlabel(name)
        print(f"{width:2} units  {name:5} {values.mean():+.2f}, deviation {values.std():.2f}")
axes[0].set_ylabel("density")
axes[0].legend()
