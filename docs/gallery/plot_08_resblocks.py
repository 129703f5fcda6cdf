"""
Residual blocks
===============

A residual block adds its input to what its convolutions compute. There are three claims: this alone
makes deep networks trainable; batch norm is needed as well; and gamma = 0 in the last norm of each
block helps further, because the block starts as the identity. Here one, four and sixteen of the
demo's blocks, with eight channels, learn the digits.
"""

import numpy as np
from common import band, make_trainer, panels, spread, train

from fastbn.demo.layers import Conv2d, GlobalAveragePool, Linear
from fastbn.demo.network import ResBlock, Sequential, norm_layers

CHANNELS, EPOCHS, SEEDS, DEPTHS, LRS = 8, 8, range(3), (1, 4, 16), (0.1, 1.0)
KINDS = {"without": ("none", False), "batch norm": ("batch", False), "gamma = 0": ("batch", True)}


def network(blocks, norm, zero_gamma, rng):
    """The demo's residual network, all blocks of one width and size."""
    first = Conv2d(1, CHANNELS, stride=2, bias=norm == "none", rng=rng)
    return Sequential(
        first,
        *norm_layers(norm, CHANNELS, "relu", np.float32),
        *(
            ResBlock(CHANNELS, CHANNELS, norm=norm, zero_gamma=zero_gamma, rng=rng)
            for _ in range(blocks)
        ),
        GlobalAveragePool(),
        Linear(CHANNELS, 10, bias=True, rng=rng),
    )


def accuracies(lr, blocks, kind, seed):
    options = {"model": "resnet", "optimizer": "sgd", "batch_size": 64, "lr": lr, "seed": seed}
    return train(make_trainer(lambda rng: network(blocks, *KINDS[kind], rng), **options), EPOCHS)


results = {
    (lr, blocks, kind): np.array([accuracies(lr, blocks, kind, seed) for seed in SEEDS])
    for lr in LRS
    for blocks in DEPTHS
    for kind in KINDS
}
axes = panels(
    *(f"{blocks} blocks, learning rate {lr:g}" for lr in LRS for blocks in DEPTHS),
    rows=2,
    height=2.8,
    sharey=True,
)
for (lr, blocks, kind), runs in results.items():
    each = axes[LRS.index(lr) * len(DEPTHS) + DEPTHS.index(blocks)]
    band(each, range(1, EPOCHS + 1), runs, kind)
    each.set_xlabel("epoch")
axes[0].legend()
for row in (axes[0], axes[len(DEPTHS)]):
    row.set_ylabel("held-out accuracy")

late = {key: runs[:, -4:].mean() for key, runs in results.items()}
for (lr, blocks, kind), runs in results.items():
    print(
        f"learning rate {lr:<3g}  blocks {blocks:2}  {kind:10}"
        f"  accuracy over the last four epochs {spread(runs[:, -4:].mean(axis=1))}"
    )

# %%
# The first claim fails: sixteen blocks without batch norm do not train at either rate, and four
# train at the lower rate only. (The sum of each block has a larger variance than its input, and
# sixteen blocks multiply this.) The second claim holds: with batch norm depth helps at the lower
# rate.
#
# The third claim holds in one case. At the lower rate gamma = 0 makes every depth far slower: a
# block that starts as the identity passes no gradient to its convolutions until gamma has moved,
# and until then the whole network is one convolution and a mean. Gamma = 0 helps in the deepest
# network at the highest rate, where the start goes wrong otherwise.

assert late[0.1, 16, "without"] < 0.2
assert late[1.0, 16, "without"] < 0.2
assert late[0.1, 4, "without"] > 0.3 > late[1.0, 4, "without"]
assert late[0.1, 1, "batch norm"] < late[0.1, 4, "batch norm"] < late[0.1, 16, "batch norm"] + 0.02
for blocks in DEPTHS:
    assert late[0.1, blocks, "gamma = 0"] < late[0.1, blocks, "batch norm"] - 0.1
assert late[1.0, 16, "gamma = 0"] > late[1.0, 16, "batch norm"] + 0.05
