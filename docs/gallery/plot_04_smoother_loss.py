"""
The smoother loss
=================

Santurkar et al. (2018) explain batch norm by the landscape: the loss and its gradient change less
along a step. This page measures it as they did. While a network trains, we go from its weights
along the negative gradient, further and further, and compute the loss and the gradient there. Both
networks train at the same learning rate, and both can use it.
"""

import numpy as np
from common import DATA, band, make_trainer, panels, train

from fastbn.demo.layers import softmax_cross_entropy

DEPTH, LR, EPOCHS, EVERY, SEEDS = 8, 0.05, 8, 10, range(3)
DISTANCES = np.array([0.02, 0.05, 0.1, 0.2, 0.4])  # in gradients: what a learning rate would be
NAMES = {"batch": "with batch norm", "none": "without"}


def flat(network, what):
    """Return copies of all parameters, or gradients, of a network as one vector."""
    arrays = [each for leaf in network.leaves().values() for each in getattr(leaf, what).values()]
    return np.concatenate([each.ravel() for each in arrays])


def move_to(network, vector):
    start = 0
    for leaf in network.leaves().values():
        for array in leaf.params.values():
            array[...] = vector[start : start + array.size].reshape(array.shape)
            start += array.size


def loss_and_gradient(network, x, y):
    loss, dlogits = softmax_cross_entropy(network.forward(x), y)
    network.backward(dlogits)
    return loss, flat(network, "grads")


def measured(norm, depth, seed):
    """Train, and return what the loss is like in the direction of every tenth step.

    For each distance d along the negative gradient g(0) these are three numbers: the change of the
    loss; |g(d) - g(0)| over |g(0)|; and the effective beta-smoothness, |g(d) - g(0)| over the
    length of the way to d.
    """
    trainer = make_trainer(norm=norm, hidden=(64,) * depth, optimizer="sgd", lr=LR, seed=seed)
    network, rng, steps, found = trainer.network, np.random.default_rng(seed), 0, []

    def look(_):
        nonlocal steps
        steps += 1
        if steps % EVERY:
            return
        rows = rng.choice(len(DATA.train[0]), 128, replace=False)
        x, y = (part[rows] for part in DATA.train)
        state, start = network.state_dict(), flat(network, "params")
        loss, gradient = loss_and_gradient(network, x, y)
        length = np.linalg.norm(gradient)
        losses, changes = [], []
        for distance in DISTANCES:
            move_to(network, start - distance * gradient)
            there, other = loss_and_gradient(network, x, y)
            losses.append(there - loss)
            changes.append(np.linalg.norm(other - gradient) / length)
        network.load_state_dict(state)  # running statistics too
        found.append((losses, changes, changes / DISTANCES))

    trainer.optimizer.register_step_post_hook(look)
    train(trainer, EPOCHS)
    return np.array(found)  # (steps, 3, distances)


found = {norm: np.array([measured(norm, DEPTH, seed) for seed in SEEDS]) for norm in NAMES}

# %%
# The figure shows the worst of the five distances at each step: the highest loss, the largest
# change of the gradient, the largest beta.

axes = panels("change of the loss", "change of the gradient", "effective beta-smoothness")
for norm, values in found.items():
    steps = EVERY * np.arange(1, values.shape[1] + 1)
    for each, runs in zip(axes, np.moveaxis(values.max(axis=-1), 2, 0), strict=True):
        band(each, steps, runs, NAMES[norm])
axes[0].set_yscale("symlog", linthresh=0.1)
axes[1].set(yscale="log", ylim=(0.1, 100))
axes[2].set(yscale="log", ylim=(1, 1000))
for each in axes:
    each.set_xlabel("step")
axes[1].legend()

# %%
# The next figure shows all distances: the median over steps and seeds. A distance of 0.05 is the
# step of this training.

profile = {norm: np.median(values, axis=(0, 1)) for norm, values in found.items()}
axes = panels(
    "change of the loss", "change of the gradient", "effective beta-smoothness", height=2.8
)
for norm, values in profile.items():
    for each, line in zip(axes, values, strict=True):
        each.plot(DISTANCES, line, marker="o", label=NAMES[norm])
for each in axes:
    each.set(xscale="log", xlabel="distance, in gradients")
    each.set_xticks(DISTANCES, DISTANCES)
    each.minorticks_off()
axes[0].legend()


def tell(depth, profile):
    for norm, (losses, changes, betas) in profile.items():
        print(
            f"depth {depth}, {NAMES[norm]:15}  at {DISTANCES[-1]:g}: loss {losses[-1]:+.2f},"
            f" gradient changed by {changes[-1]:.1f} of itself;  beta {betas.max():.1f}"
        )


tell(DEPTH, profile)

# %%
# This claim holds clearly. At eight times the step of this training, the loss with batch norm is
# still below that at the start, and the gradient has changed by about its own length. Without batch
# norm the loss has risen, and the gradient has changed by far more. This is why batch norm trains
# at higher rates. Beta with batch norm is not small, though: it is some two times smaller. The
# difference is how far away the bad places are.

smooth, rough = profile["batch"], profile["none"]
assert smooth[0, -1] < 0 < rough[0, -1]
assert 0.5 < smooth[1, -1] < 1.5
assert rough[1, -1] > 3 * smooth[1, -1]
assert rough[2].max() / 4 < smooth[2].max() < rough[2].max() / 1.2

# %%
# Does this come from the depth? Here is the same for a single hidden layer:

shallow = {
    norm: np.median([measured(norm, 1, seed) for seed in SEEDS], axis=(0, 1)) for norm in NAMES
}
tell(1, shallow)

# %%
# The gradient still changes less with batch norm, but the loss falls along the way with and without
# it. So a smoother landscape helps most where the landscape is rough.

assert shallow["batch"][1, -1] < shallow["none"][1, -1]
assert shallow["none"][0, -1] < 0
