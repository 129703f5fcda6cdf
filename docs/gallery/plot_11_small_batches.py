"""
Batch size 4: five ways
=======================

Large images, video and long sequences leave room for few examples at a time, and so do many small
machines. The statistics of four examples are noisy, and the four may be alike. This page trains a
small convolutional network by five norms that see four images at a time. Two of them stand for
eight machines, which train on 32 images in each step:

- **batch norm**: the statistics of the four images;
- **renorm**: batch renormalisation, ``BatchNorm(renorm=(3, 5))``. A correction by the running
  statistics makes y in training what it is in evaluation. The first epoch has no correction;
- **instance norm**: each image by itself;
- **virtual batches**: eight machines, each normalises its four images by themselves;
- **synchronised**: eight machines, which send each other their moments, so that all normalise by
  the statistics of all 32 images.
"""

import numpy as np
from common import DATA, band, panels, spread

from fastbn import BatchNorm, InstanceNorm, batch_moments, batch_norm, merge_moments, optim
from fastbn.demo.layers import Conv2d, Flatten, Linear, softmax_cross_entropy
from fastbn.demo.network import Sequential

# %%
# Eight machines in one process
# -----------------------------
#
# Neither a virtual batch nor a synchronised norm needs eight machines here. Virtual batches of 4 in
# a minibatch of 32 are what eight machines compute that do not talk. And the merged moments of the
# eight are those of the minibatch of 32:

parts = np.split(DATA.train[0][:32], 8)
mean, var, count = merge_moments(*map(batch_moments, parts))
_, cache = batch_norm(np.concatenate(parts))
print(f"{count} values: mean {mean.item():.6f} and {cache.mean.item():.6f}")

assert np.allclose(mean, cache.mean)
assert np.allclose(var, cache.var)

# %%
# The five
# --------

EPOCHS, SEEDS = 4, range(4)
WAYS = {
    "batch norm": (BatchNorm, {}, 4),
    "renorm": (BatchNorm, {"renorm": (1, 0)}, 4),
    "instance norm": (InstanceNorm, {"affine": True}, 4),
    "virtual batches": (BatchNorm, {"virtual_batch_size": 4}, 32),
    "synchronised": (BatchNorm, {}, 32),
}
x, labels = DATA.train


def build(rng, norm, options):
    """Return a network of three convolutions, each with a norm and ReLU."""
    layers = []
    for c_in, c_out, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers.append(Conv2d(c_in, c_out, stride=stride, bias=False, rng=rng))
        layers.append(norm(c_out, activation="relu", **options))
    return Sequential(*layers, Flatten(), Linear(32 * 4, 10, bias=True, rng=rng))


def at_random(rng):
    """Return the rows of all examples, any four beside each other."""
    return rng.permutation(len(x))


def alike(rng):
    """Return the rows of all examples, four of one digit beside each other."""
    order = rng.permutation(len(x))
    of_each = (order[labels[order] == digit] for digit in range(10))
    fours = [rows[: len(rows) // 4 * 4].reshape(-1, 4) for rows in of_each]
    return rng.permutation(np.concatenate(fours)).ravel()


def train(way, order, seed):
    """Return the held-out accuracy after each epoch, and that of the last epoch in training."""
    norm, options, size = WAYS[way]
    rng = np.random.default_rng(seed)
    network = build(rng, norm, options)
    layers = list(network.leaves().values())
    # Eight times the images in a step, and so eight times fewer steps, which are larger.
    optimizer = optim.Adam([each for each in layers if each.params], 0.001 * np.sqrt(size / 4))
    held_out = []
    for epoch in range(EPOCHS):
        if way == "renorm" and epoch == 1:
            for layer in layers:
                if isinstance(layer, BatchNorm):
                    layer.renorm = (3, 5)
        rows, hits = order(rng), 0
        network.train()
        minibatches = rows[: len(rows) // 32 * 32].reshape(-1, size)
        for batch in minibatches:
            logits = network.forward(x[batch])
            _, dlogits = softmax_cross_entropy(logits, labels[batch])
            network.backward(dlogits)
            optimizer.step()
            hits += np.count_nonzero(logits.argmax(axis=1) == labels[batch])
        network.eval()
        unseen, answers = DATA.test
        held_out.append((network.forward(unseen).argmax(axis=1) == answers).mean())
    return held_out, hits / minibatches.size


# %%
# Two orders
# ----------
#
# First, minibatches are drawn at random, as usual. Then the four images of a machine are of one
# digit: this is what a camera or a client sees, whose data are alike. The digits of the eight
# machines still differ.

ORDERS = {"four at random": at_random, "four of one digit": alike}
accuracies, seen = {}, {}
for axes, (title, order) in zip(panels(*ORDERS, sharey=True), ORDERS.items(), strict=True):
    for way in WAYS:
        curves, last = zip(*(train(way, order, seed) for seed in SEEDS), strict=True)
        accuracies[title, way] = np.array(curves)
        seen[title, way] = np.mean(last)
        band(axes, range(1, EPOCHS + 1), curves, way)
        print(
            f"{title:17}  {way:15}  held out {spread(accuracies[title, way][:, -1])}, "
            f"in training {seen[title, way]:.3f}"
        )
    axes.set(xlabel="epoch", ylim=(0.88, 1))
    axes.set_xticks(range(1, EPOCHS + 1))
    if title == "four at random":
        axes.set_ylabel("held-out accuracy")
        axes.legend(loc="lower right")

# %%
# Four at random are enough. In a convolution each image brings many values for a channel, and the
# five end within two hundredths of each other.
#
# Four of one digit are not. Batch norm removes what the four have in common, and the network learns
# from what is left; in training it is nearly always right. Evaluation removes what all digits have
# in common, which is something else, and batch norm falls behind. Eight machines that do not talk
# have the same trouble. Three ways keep their accuracy: renorm, as what it trains is what it
# evaluates; instance norm, as it looks at one image; and the synchronised norm, as it sees images
# of all kinds. So:
#
# - are the examples drawn at random, and do they bring many values? Batch norm will do;
# - are they alike, on one machine? Renorm, or instance norm where contrast has no meaning
#   (:doc:`/why/plot_10_instance_norm`);
# - are they alike on each of several machines? Synchronise.

end = {key: curves[:, -1].mean() for key, curves in accuracies.items()}
random = [end["four at random", way] for way in WAYS]
assert max(random) - min(random) < 0.02
sorted_ones = {way: end["four of one digit", way] for way in WAYS}
for good in ("renorm", "instance norm", "synchronised"):
    assert sorted_ones[good] > sorted_ones["batch norm"] + 0.01
    assert sorted_ones[good] > sorted_ones["virtual batches"]
gaps = {way: seen["four of one digit", way] - sorted_ones[way] for way in WAYS}
assert gaps["batch norm"] > 0.03
assert gaps["batch norm"] > 2 * gaps["renorm"]
