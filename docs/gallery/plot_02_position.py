"""
Before or after the activation, and the bias of Z
=================================================

The course puts batch norm between ``Z = W A`` and the activation, and drops the bias of Z. Others
put batch norm after the activation. A network of four hidden layers tries both.
"""

from itertools import pairwise

import numpy as np
from common import SEEDS, band, make_trainer, panels, perceptron, spread, train

from fastbn import BatchNorm
from fastbn.demo.layers import ReLU

HIDDEN, EPOCHS = (64,) * 4, 15


def before_relu(rng):
    return perceptron(rng, HIDDEN, lambda units: [BatchNorm(units), ReLU()])


def after_relu(rng):
    return perceptron(rng, HIDDEN, lambda units: [ReLU(), BatchNorm(units)])


def before_relu_with_bias(rng):
    return perceptron(rng, HIDDEN, lambda units: [BatchNorm(units), ReLU()], bias=True)


def runs(build, optimizer, lr):
    options = {"hidden": HIDDEN, "optimizer": optimizer, "lr": lr}
    return [train(make_trainer(build, seed=seed, **options), EPOCHS) for seed in SEEDS]


# %%
# Before or after
# ---------------

SETTINGS = (("sgd", 0.03), ("sgd", 0.3), ("adam", 0.003), ("adam", 0.03))
curves = {
    (build, setting): runs(build, *setting)
    for setting in SETTINGS
    for build in (before_relu, after_relu)
}
axes = panels(*(f"{name}, learning rate {lr:g}" for name, lr in SETTINGS), rows=2, sharey=True)
for (build, setting), accuracies in curves.items():
    at = axes[SETTINGS.index(setting)]
    band(at, range(1, EPOCHS + 1), accuracies, build.__name__.replace("_", " "))
    at.set(ylim=(0.8, 1), xlabel="epoch", ylabel="held-out accuracy")
axes[0].legend(loc="lower right")

for setting in SETTINGS:
    ends = [[run[-1] for run in curves[build, setting]] for build in (before_relu, after_relu)]
    print(f"{setting[0]:4} {setting[1]:<5g}  before {spread(ends[0])}  after {spread(ends[1])}")

# %%
# The two positions end within three hundredths of each other in all settings, and seeds differ by
# nearly as much. *After* is quicker in the first epochs at the lowest learning rate. So the
# course's order is a good default and no law. The arithmetic around it decides in practice: before
# the activation, batch norm folds into the linear map for inference, and ReLU can be fused with it.

means = {key: np.mean(accuracies, axis=0) for key, accuracies in curves.items()}
for setting in SETTINGS:
    assert abs(means[before_relu, setting] - means[after_relu, setting])[-1] < 0.03
assert (means[after_relu, SETTINGS[0]] > means[before_relu, SETTINGS[0]])[:2].all()

# %%
# The bias of Z
# -------------
#
# Batch norm subtracts the mean, and with it whatever is added to a whole channel. So the gradient
# of the bias must be zero. The left figure shows it at each step, divided by the gradient of beta,
# which is what a bias would get without batch norm. The right figure shows how far the bias has
# moved from zero.


def watch(optimizer, lr):
    trainer = make_trainer(before_relu_with_bias, hidden=HIDDEN, optimizer=optimizer, lr=lr)
    layers = list(trainer.network.children.values())
    pairs = [(a, b) for a, b in pairwise(layers) if isinstance(b, BatchNorm)]
    gradients, sizes = [], []

    def note(_):
        gradients.append(
            np.mean(
                [
                    np.linalg.norm(linear.grads["bias"]) / np.linalg.norm(norm.grads["beta"])
                    for linear, norm in pairs
                ]
            )
        )
        sizes.append(np.mean([abs(linear.params["bias"]).mean() for linear, _ in pairs]))

    trainer.optimizer.register_step_post_hook(note)
    train(trainer, EPOCHS)
    return gradients, sizes


left, right = panels("gradient of the bias over that of beta", "mean size of the bias")
last = {}
for optimizer, lr in (("sgd", 0.3), ("adam", 0.003)):
    gradients, sizes = watch(optimizer, lr)
    left.semilogy(gradients, label=optimizer, linewidth=0.8)
    right.semilogy(sizes, label=optimizer)
    last[optimizer] = np.median(gradients), sizes[-1]
    print(
        f"{optimizer:4}  gradient of the bias / of beta: {last[optimizer][0]:.0e} in the median"
        f"  size of the bias after {len(sizes)} steps: {last[optimizer][1]:.0e}"
    )
for each in (left, right):
    each.set_xlabel("step")
    each.legend()
left.set_ylim(1e-9, 1e-5)
with_bias = runs(before_relu_with_bias, "adam", 0.003)
print("adam without bias", spread([run[-1] for run in curves[before_relu, ("adam", 0.003)]]))
print("adam with bias   ", spread([run[-1] for run in with_bias]))

# %%
# The gradient is zero up to rounding: less than a hundred-thousandth of that of beta. Gradient
# descent leaves the bias where it was. Adam moves it more than ten thousand times as far, because
# Adam divides each gradient by its own size and so turns the noise of rounding into steps. These
# steps change nothing in what the network computes in training, and the accuracies above agree. But
# the bias costs time and memory. Leave it out.

assert last["sgd"][0] < 1e-5
assert last["adam"][0] < 1e-5
assert last["adam"][1] > 1e4 * last["sgd"][1]
assert abs(np.mean([run[-1] for run in with_bias]) - means[before_relu, ("adam", 0.003)][-1]) < 0.01
