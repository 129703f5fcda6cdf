"""
Instance norm against batch norm
================================

Both subtract a mean and divide by a deviation. Batch norm computes them over the minibatch,
instance norm over the positions of one example. So instance norm needs images or sequences, and the
batch size does not matter to it. Which of the two is better depends on what they remove: does it
carry a meaning?
"""

import numpy as np
from common import DATA, band, make_trainer, panels, spread, train

import fastbn
from fastbn.demo.data import Data

# %%
# What each averages over
# -----------------------
#
# Here are four images with one channel. One image is bright. Batch norm keeps it bright, and
# instance norm does not:

rng = np.random.default_rng(0)
images = rng.standard_normal((4, 1, 8, 8))
images[0] += 5
batch, _ = fastbn.batch_norm(images)
instance, _ = fastbn.instance_norm(images)
for name, y in (("before", images), ("batch norm", batch), ("instance norm", instance)):
    print(f"{name:13}  means of the images: {y.mean(axis=(1, 2, 3)).round(2) + 0.0}")

assert batch[0].mean() > 1
assert abs(instance.mean(axis=(1, 2, 3))).max() < 1e-9

# %%
# Two tasks
# ---------
#
# The demo's residual network learns two tasks. One is the digits as they are. In the other the
# strength of an image is all that counts: half of the digits are dimmed to one half, and the label
# says which.

SEEDS, EPOCHS = range(3), 8
NAMES = {"batch": "batch norm", "instance": "instance norm", "none": "without"}
OPTIONS = {"model": "resnet", "hidden": (8, 16), "batch_size": 64, "lr": 0.01}


def dimmed(examples):
    """Return the images, their values >= 0, every other one at half its strength, and labels."""
    x = examples[0] - DATA.train[0].min()
    labels = np.arange(len(x)) % 2
    return x * np.where(labels, 0.5, 1).astype(x.dtype)[:, None, None, None], labels


tasks = {
    "which digit": DATA,
    "how strong": Data(dimmed(DATA.train), dimmed(DATA.validation), dimmed(DATA.test)),
}
trained = {
    (task, norm): [make_trainer(data=data, norm=norm, seed=seed, **OPTIONS) for seed in SEEDS]
    for task, data in tasks.items()
    for norm in NAMES
}
curves = {
    key: np.array([train(each, EPOCHS if key[0] == "which digit" else 4) for each in trainers])
    for key, trainers in trained.items()
}
axes = panels(*tasks)
for (task, norm), runs in curves.items():
    each = axes[list(tasks).index(task)]
    band(each, range(1, runs.shape[1] + 1), runs, NAMES[norm])
    each.set_xlabel("epoch")
    print(f"{task}: {NAMES[norm]:13}  accuracy at the end {spread(runs[:, -1])}")
axes[0].set_ylabel("held-out accuracy")
axes[0].legend()
axes[1].set_xticks(range(1, 5))

# %%
# Other light at test time
# ------------------------
#
# The networks that have learned the digits get held-out images of another contrast and brightness.
# Each image has a random change: a factor from 1 - s to 1 + s, and a shift by up to s deviations.

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8)


def relit(strength):
    rng = np.random.default_rng(0)
    x, labels = DATA.test
    shape = (len(x), 1, 1, 1)
    factor, shift = (
        1 + rng.uniform(-strength, strength, shape),
        rng.uniform(-strength, strength, shape),
    )
    return (x * factor + shift).astype(x.dtype), labels


axes = panels("after training on images as they are")
relit_accuracy = {}
for norm, name in NAMES.items():
    runs = np.array(
        [
            [trainer.evaluate(relit(strength))[1] for strength in STRENGTHS]
            for trainer in trained["which digit", norm]
        ]
    )
    band(axes, STRENGTHS, runs, name, marker="o")
    relit_accuracy[norm] = runs.mean(axis=0)
    print(f"{name:13}  " + ", ".join(f"{a:.3f}" for a in relit_accuracy[norm]), "at", STRENGTHS)
axes.set(xlabel="strength of the change, s", ylabel="held-out accuracy")
axes.legend()

# %%
# On the digits as they are, batch norm and instance norm end within two hundredths of each other,
# and both are ahead of the network without a norm. Where the strength of the image is the answer,
# instance norm has the accuracy of a coin: its first layer removes the strength of each image.
# Where the strength means nothing and changes, this helps: the light hardly matters to instance
# norm. Batch norm has running statistics of the light that it was trained in, and loses more than
# the network without a norm.
#
# So ask what the mean and the contrast of one example are: a nuisance (style, light, loudness) or a
# part of the answer. If minibatches are tiny, or examples must not depend on each other, then
# instance norm is the only choice of the two.

end = {key: runs[:, -1].mean() for key, runs in curves.items()}
assert abs(end["which digit", "batch"] - end["which digit", "instance"]) < 0.02
assert end["which digit", "none"] < min(end["which digit", "batch"], end["which digit", "instance"])
assert end["how strong", "instance"] < 0.6
assert min(end["how strong", "batch"], end["how strong", "none"]) > 0.95
assert relit_accuracy["instance"][-1] > relit_accuracy["instance"][0] - 0.04
assert relit_accuracy["batch"][-1] < relit_accuracy["none"][-1] < relit_accuracy["instance"][-1]
