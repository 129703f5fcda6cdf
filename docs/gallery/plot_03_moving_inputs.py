"""
The moving inputs of deeper layers
==================================

While a network learns, the inputs of its deeper layers move, because the layers before them change.
Batch norm was invented to hold these inputs still. The paper, and the course, say that this is why
it works: it reduces the "internal covariate shift". Santurkar et al. (2018) doubted it and made an
experiment: they added noise *after* batch norm, which moves the inputs again at each step. This
page measures the movement and repeats the experiment.
"""

from copy import deepcopy

import numpy as np
from common import DATA, band, make_trainer, panels, perceptron, train

from fastbn import BatchNorm
from fastbn.demo.layers import Layer, Linear, ReLU, softmax_cross_entropy

HIDDEN, EPOCHS, SEEDS, MIDDLE = (64,) * 6, 12, range(3), 4
NOISE = np.random.default_rng(0)  # one for all layers and their copies: no two draws are alike


class Shake(Layer):
    """In training, a random scale and shift of each channel, drawn anew for each minibatch."""

    def forward(self, x):
        if not self.training:
            return x
        channels = x.shape[1]
        self.scale = NOISE.uniform(0.5, 1.5, channels).astype(x.dtype)
        return x * self.scale + NOISE.uniform(-1, 1, channels).astype(x.dtype)

    def backward(self, dy):
        return dy * self.scale


def plain(rng):
    return perceptron(rng, HIDDEN, lambda _: [ReLU()], bias=True)


def normed(rng):
    return perceptron(rng, HIDDEN, lambda units: [BatchNorm(units), ReLU()])


def shaken(rng):
    return perceptron(rng, HIDDEN, lambda units: [BatchNorm(units), Shake(), ReLU()])


NETWORKS = {"without": plain, "batch norm": normed, "batch norm and noise": shaken}

# %%
# Two numbers tell how much the inputs of the fifth linear layer move. They are taken at every fifth
# step, on 256 training examples that stay the same. *Movement*: by how many of its standard
# deviations an input changes in one step. *Angle*: the gradient of this layer's weights before and
# after the layers in front of it are updated, and the angle between the two in degrees. Santurkar
# et al. define the shift by this angle.


def probe(network):
    """Return the input of the middle linear layer and the gradient of its weights."""
    x, y = (part[:256] for part in DATA.train)
    _, dlogits = softmax_cross_entropy(network.forward(x), y)
    network.backward(dlogits)
    layer = [each for each in network.children.values() if isinstance(each, Linear)][MIDDLE]
    return layer.x, layer.grads["weight"].ravel()


def measured(build, lr, seed):
    """Train, and return accuracies, movements and angles."""
    trainer = make_trainer(build, hidden=HIDDEN, optimizer="sgd", lr=lr, seed=seed)
    steps, before, movements, angles = 0, None, [], []

    def remember(_):
        nonlocal before
        before = deepcopy(trainer.network)

    def compare(_):
        nonlocal steps
        steps += 1
        if steps % 5:
            return
        mixed, after = deepcopy(before), deepcopy(trainer.network)
        seen = 0
        for old, new in zip(mixed.children.values(), after.children.values(), strict=True):
            seen += isinstance(old, Linear)
            if seen > MIDDLE:
                break
            for name, value in new.params.items():
                old.params[name][...] = value
        (x, gradient), (_, changed), (moved, _) = probe(before), probe(mixed), probe(after)
        spread_of_x = x.std(axis=0)
        alive = spread_of_x > 1e-3  # a unit that is zero for every example has no movement
        movements.append((abs(moved - x).mean(axis=0) / (spread_of_x + 1e-12))[alive].mean())
        cosine = gradient @ changed / (np.linalg.norm(gradient) * np.linalg.norm(changed) + 1e-30)
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    trainer.optimizer.register_step_pre_hook(remember)
    trainer.optimizer.register_step_post_hook(compare)
    return train(trainer, EPOCHS), movements, angles


LRS = (0.03, 0.3)
results = {
    (name, lr): [measured(build, lr, seed) for seed in SEEDS]
    for name, build in NETWORKS.items()
    for lr in LRS
}
axes = panels(
    *(f"{what}, learning rate {lr:g}" for what in ("accuracy", "movement", "angle") for lr in LRS),
    rows=3,
    height=2.6,
)
for (name, lr), runs in results.items():
    accuracies, movements, angles = zip(*runs, strict=True)
    column = LRS.index(lr)
    band(axes[column], range(1, EPOCHS + 1), accuracies, name)
    band(axes[2 + column], 5 * np.arange(1, len(movements[0]) + 1), movements, name)
    band(axes[4 + column], 5 * np.arange(1, len(angles[0]) + 1), angles, name)
axes[0].legend(loc="lower right")
for each in axes[2:4]:
    each.set_yscale("log")
for each in axes[4:]:
    each.set_xlabel("step")

movement, angle, whole, end = {}, {}, {}, {}
for key, runs in results.items():
    accuracies, movements, angles = zip(*runs, strict=True)
    movement[key], angle[key] = np.median(movements), np.median(angles)
    whole[key], end[key] = np.mean(accuracies), np.mean(accuracies, axis=0)[-1]
    print(
        f"{key[0]:20}  lr {key[1]:<4g}  movement {movement[key]:.2f}  angle {angle[key]:2.0f}"
        f"  accuracy over all epochs {whole[key]:.3f}, at the end {end[key]:.3f}"
    )

# %%
# The first half of the story holds on this network: batch norm keeps the inputs of deeper layers
# stiller, by both measures. (Santurkar et al. found no difference in their networks.) The second
# half fails. With the noise the inputs move more than five times as much as without batch norm, and
# the gradient before an update says next to nothing about the one after it: the angle is nearly a
# right one. Still, at the high learning rate this network learns faster than the network without
# batch norm, whose inputs are much stiller. So stillness is not the reason why batch norm trains at
# high rates. Noise is not free either: at the low rate, where batch norm has nothing to gain, the
# network with noise learns more slowly than the one without batch norm.

for lr in LRS:
    still, normed_, noisy = (movement[name, lr] for name in NETWORKS)
    assert normed_ < still < noisy / 5
    still, normed_, noisy = (angle[name, lr] for name in NETWORKS)
    assert normed_ < still < noisy
    assert noisy > 70
assert whole["batch norm and noise", 0.3] > whole["without", 0.3]
assert whole["batch norm and noise", 0.03] < whole["without", 0.03]
