"""
With and without
================

Batch norm is said to make training faster, and to let networks train at almost any learning rate.
Here the demo's multilayer perceptron learns the digits with and without it, in all other things
alike: the same weights to start from, the same minibatches, the same optimizer.
"""

import numpy as np
from common import GUESSING, SEEDS, band, epochs_to, make_trainer, panels, train

# %%
# Epochs to 95%
# -------------
#
# Gradient descent on a network of eight hidden layers, each way at three learning rates. The line
# is the mean of five seeds, the band goes from the worst of them to the best.

EPOCHS, DEPTH = 15, 8
RATES = (0.01, 0.1, 1.0)
NAMES = {"batch": "with batch norm", "none": "without"}

curves = {
    (norm, lr): [
        train(make_trainer(norm=norm, hidden=(64,) * DEPTH, optimizer="sgd", lr=lr, seed=s), EPOCHS)
        for s in SEEDS
    ]
    for norm in NAMES
    for lr in RATES
}
axes = panels(*(f"learning rate {lr:g}" for lr in RATES), sharey=True)
for (norm, lr), runs in curves.items():
    band(axes[RATES.index(lr)], range(1, EPOCHS + 1), runs, NAMES[norm])
for each in axes:
    each.axhline(0.95, color="gray", linestyle=":")
    each.set_xlabel("epoch")
axes[0].set_ylabel("held-out accuracy")
axes[0].legend(loc="lower right")

reached, median = {}, {}
for key, runs in curves.items():
    epochs = [epochs_to(0.95, run) for run in runs]
    reached[key], median[key] = int(np.isfinite(epochs).sum()), np.median(epochs)
    when = f", in the median after {median[key]:g} epochs" if np.isfinite(median[key]) else ""
    print(f"{NAMES[key[0]]:15}  lr {key[1]:<4g}  {reached[key]} of {len(runs)} reach 95%{when}")

# %%
# At the two higher learning rates the folklore holds: at 0.1 batch norm needs fewer epochs, and
# 1.0 is out of reach without it. At the low one it does not: there the network *without* batch
# norm is ahead. Batch norm makes the output independent of the scale of the weights before it, so
# a step of the same size turns a large weight by less; it makes high learning rates possible, and
# needs them.

assert median["batch", 0.1] < median["none", 0.1]
assert reached["none", 1.0] == 0
assert reached["batch", 1.0] >= 4
assert np.mean(curves["batch", 0.01], axis=0)[-1] < np.mean(curves["none", 0.01], axis=0)[-1]

# %%
# Which learning rates train
# --------------------------
#
# The held-out accuracy after eight epochs, the mean of three seeds, over learning rate and depth.

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DEPTHS = (1, 2, 4, 8, 16)


def accuracy_after(epochs, depth, lr, norm):
    trainers = [
        make_trainer(norm=norm, hidden=(64,) * depth, optimizer="sgd", lr=lr, seed=seed)
        for seed in range(3)
    ]
    return np.mean([train(trainer, epochs)[-1] for trainer in trainers])


maps = {
    norm: np.array([[accuracy_after(8, depth, lr, norm) for lr in LRS] for depth in DEPTHS])
    for norm in NAMES
}
axes = panels(*NAMES.values(), sharey=True)
for each, values in zip(axes, maps.values(), strict=True):
    image = each.imshow(values, vmin=GUESSING, vmax=1, cmap="viridis", aspect="auto")
    each.set_xticks(range(len(LRS)), [f"{lr:g}" for lr in LRS], rotation=45)
    each.set_yticks(range(len(DEPTHS)), DEPTHS)
    each.set_xlabel("learning rate")
    each.grid(False)
    for (row, column), value in np.ndenumerate(values):
        color = "black" if value > 0.6 else "white"
        each.text(column, row, f"{value:.2f}", color=color, ha="center", va="center", fontsize=6.5)
axes[0].set_ylabel("hidden layers")
axes[0].figure.colorbar(image, ax=axes, label="held-out accuracy")


def highest(norm):
    """The highest learning rate with which each depth comes above 80%."""
    return np.array([np.max(LRS, where=row > 0.8, initial=0) for row in maps[norm]])


factors = highest("batch") / highest("none")
for depth, factor in zip(DEPTHS, factors, strict=True):
    print(f"{depth:2} hidden layers: the highest rate above 80% is {factor:.0f} times as high with")

# %%
# Each depth has learning rates that only batch norm can use, more of them the deeper the network
# is, and in the deepest network no rate does as well without it. But the map is also shifted: on
# its left edge, at the lowest learning rate, the network without batch norm is the better one at
# each depth, and with a single hidden layer the best rate of either way is as good as that of the
# other. "Trains at any learning rate" is not what the numbers say. They say: at higher ones, by
# the factors above.

assert (factors >= 3).all()
assert factors[-1] > factors[0]
assert (maps["none"][:, 0] > maps["batch"][:, 0]).all()
best = {norm: values.max(axis=1) for norm, values in maps.items()}
assert abs(best["batch"] - best["none"])[0] < 0.01
assert best["batch"][-1] > best["none"][-1] + 0.02
