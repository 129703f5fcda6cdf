"""
The slight regularisation, and small batches
============================================

The mean and variance of a minibatch are noisy estimates, so batch norm adds noise to each hidden
unit. The course calls this a slight regularisation, which larger batches make weaker. This page
measures the noise, then its effect on held-out examples, and then what happens at batch size 2.
"""

import numpy as np
from common import DATA, band, make_trainer, panels, perceptron, spread, train

from fastbn import BatchNorm, batch_norm
from fastbn.demo.data import Data

# %%
# The noise
# ---------
#
# We train a network and send minibatches of several sizes through it. The figure shows the distance
# between the mean of a minibatch and the mean of all training examples, in standard deviations, in
# the first and in the last norm.

HIDDEN, SIZES = (128, 128), (2, 4, 8, 16, 32, 64, 160)
trainer = make_trainer(hidden=HIDDEN)
train(trainer, 5)
rng = np.random.default_rng(0)
x = DATA.train[0]


def statistics(rows):
    """Return mean and deviation of what the two norms get, shape (2 norms, 2, channels)."""
    values, found = x[rows], []
    for layer in trainer.network.children.values():
        if isinstance(layer, BatchNorm):
            found.append([values.mean(axis=0), values.std(axis=0)])
        values = layer.forward(values)
    return np.array(found)


trainer.network.eval()  # so that the input of the second norm has no noise of the first in it
whole = statistics(slice(None))
noise = {}
for size in SIZES:
    batches = [statistics(rng.choice(len(x), size, replace=False)) for _ in range(50)]
    errors = [(batch[:, 0] - whole[:, 0]) / (whole[:, 1] + 1e-6) for batch in batches]
    noise[size] = np.sqrt(np.mean(np.square(errors), axis=(0, 2)))
axes = panels("noise of the mean", height=3)
values = np.array(list(noise.values()))
axes.loglog(SIZES, values[:, 0], marker="o", label="first norm")
axes.loglog(SIZES, values[:, 1], marker="o", label="last norm")
axes.loglog(SIZES, 1 / np.sqrt(SIZES), color="gray", linestyle=":", label="1 / sqrt(batch size)")
axes.set(xlabel="batch size", ylabel="standard deviations")
axes.set_xticks(SIZES, SIZES)
axes.set_yticks((0.1, 0.2, 0.5), (0.1, 0.2, 0.5))
axes.minorticks_off()
axes.legend()
for size, (first, last) in noise.items():
    print(f"batch size {size:3}: off by {first:.2f} in the first norm, by {last:.2f} in the last")

# %%
# The noise is as large as statistics says: one over the root of the batch size.

assert (abs(values * np.sqrt(SIZES)[:, None] - 1) < 0.25).all()

# %%
# Does it regularise?
# -------------------
#
# Only the noise may change here. A smaller batch would also bring more steps and noisier gradients.
# A *virtual batch* changes the noise alone: the batch size is always 160, and the norm takes its
# statistics from parts of the batch. We train on 320 examples only, so that there is something to
# regularise.

EPOCHS, SEEDS = 50, range(4)
FEW = Data(tuple(part[:320] for part in DATA.train), DATA.validation, DATA.test)


def virtual(size):
    def norm(units):
        return [BatchNorm(units, activation="relu", virtual_batch_size=size)]

    return lambda rng: perceptron(rng, HIDDEN, norm)


def results(build, **options):
    """Return held-out accuracies, and the losses at the end on seen and on unseen examples."""
    found = []
    for seed in SEEDS:
        trainer = make_trainer(
            build, data=FEW, hidden=HIDDEN, batch_size=160, lr=0.01, seed=seed, **options
        )
        accuracies = train(trainer, EPOCHS)
        losses = [trainer.evaluate(examples)[0] for examples in (FEW.train, FEW.test)]
        found.append((accuracies, *losses))
    return [np.array(each) for each in zip(*found, strict=True)]


# sphinx_gallery_thumbnail_number = 2
runs = {size: results(virtual(size)) for size in SIZES}
without = results(None, norm="none")

left, right = panels("held-out accuracy", "loss at the end")
for size in (2, 4, 16, 160):
    band(left, range(1, EPOCHS + 1), runs[size][0], f"virtual batches of {size}")
band(left, range(1, EPOCHS + 1), without[0], "without batch norm", color="black", linestyle="--")
left.set(xlabel="epoch", ylim=(0.5, 1))
left.legend(loc="lower right")
for at, name in ((1, "trained on"), (2, "held out")):
    band(right, SIZES, np.transpose([run[at] for run in runs.values()]), name, marker="o")
    right.axhline(without[at].mean(), color=f"C{at - 1}", linestyle=":")
right.set(xscale="log", yscale="log", xlabel="size of the virtual batches (dotted: without)")
right.set_xticks(SIZES, SIZES)
right.minorticks_off()
right.legend()
ends = {size: run[0][:, -5:].mean(axis=1) for size, run in runs.items()}
ends["without"] = without[0][:, -5:].mean(axis=1)
for name, values in ends.items():
    _, seen, unseen = runs.get(name, without)
    print(
        f"{name!s:>7}  accuracy {spread(values)}  loss {seen.mean():.4f}, held out {spread(unseen)}"
    )

# %%
# The numbers contradict the course. From virtual batches of 4 to those of 160 the noise falls to a
# sixth, but the accuracy on held-out examples stays: the bands lie on each other. At 2 the noise is
# so large that even the training examples have a high loss afterwards. Batch norm generalises
# better than no norm, by accuracy and by loss. It also does so with next to no noise. So the noise
# of the minibatch is not what regularises here.

means = {name: values.mean() for name, values in ends.items()}
assert all(abs(means[size] - means[160]) < 0.015 for size in SIZES[1:])
assert means[2] < means[160] - 0.05
assert runs[2][1].mean() > 0.1
assert means[160] > means["without"]
assert runs[160][2].mean() < 0.8 * without[2].mean()

# %%
# Batch size 2
# ------------
#
# Two values that are normalised together keep their order and lose everything else:

for pair in ([3.0, 3.1], [3.0, 300.0]):
    y, _ = batch_norm(np.array(pair)[:, None])
    print(pair, "become", y.ravel().round(2))

# %%
# So a multilayer perceptron with batch norm should learn little at this size. We compare it with
# the perceptron without batch norm at the same sizes of the *real* batch, four epochs each. A
# convolution has many values per channel in each image, so batch size 2 should be no problem there.
# InstanceNorm normalises each image by itself, so the batch size cannot matter to it.

REAL = (2, 4, 8, 32)
mlps = {
    norm: [
        [
            train(make_trainer(norm=norm, batch_size=size, lr=0.001, seed=seed), 4)[-1]
            for size in REAL
        ]
        for seed in range(3)
    ]
    for norm in ("batch", "none")
}
RESNET = {"model": "resnet", "hidden": (8, 16), "batch_size": 2, "lr": 0.001}
resnets = {
    norm: [train(make_trainer(norm=norm, seed=seed, **RESNET), 2) for seed in range(3)]
    for norm in ("batch", "instance", "none")
}
left, right = panels("perceptron after four epochs", "residual network, batch size 2")
for norm, accuracies in mlps.items():
    band(left, REAL, accuracies, norm, marker="o")
for norm, accuracies in resnets.items():
    band(right, (1, 2), accuracies, norm, marker="o")
    print(f"residual network, norm {norm:8}, batch size 2: {spread([a[-1] for a in accuracies])}")
left.set(xscale="log", xlabel="batch size", ylabel="held-out accuracy")
left.set_xticks(REAL, REAL, minor=False)
left.minorticks_off()
right.set_xlabel("epoch")
right.set_xticks((1, 2))
left.legend()
right.legend()
mlp_means = {norm: np.mean(accuracies, axis=0) for norm, accuracies in mlps.items()}
for norm, accuracies in mlp_means.items():
    print(f"perceptron, norm {norm:5}: " + ", ".join(f"{a:.3f}" for a in accuracies), "at", REAL)

# %%
# At batch size 2 the perceptron is far better without batch norm. From 4 on it does as well with
# batch norm as without, or better: 2 is the only size that ruins it. A virtual batch does not help
# here. It is made for the opposite case, batches too large to be noisy, and the second figure shows
# that noise brought nothing. InstanceNorm helps where an example has many values per channel, but
# batch norm hardly needs help there: at batch size 2 the three residual networks stay close
# together, because each image brings enough values. A perceptron has one value per channel and
# example, and InstanceNorm would turn it into zero. So leave the norm out at batch size 2.

assert mlp_means["batch"][0] < mlp_means["none"][0] - 0.05
assert (mlp_means["batch"][1:] > mlp_means["none"][1:] - 0.02).all()
resnet_means = {norm: np.mean(accuracies, axis=0)[-1] for norm, accuracies in resnets.items()}
assert min(resnet_means.values()) > 0.75
assert max(resnet_means.values()) - min(resnet_means.values()) < 0.08
