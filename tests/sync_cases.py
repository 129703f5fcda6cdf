"""Minibatches in parts, and what synchronised batch norm must make of them."""

import numpy as np
from support import assert_close

from fastbn import BatchNorm

CUTS = {1: [[]], 2: [[5], [0], [12]], 3: [[2, 3], [0, 0], [7, 12]], 8: [[1, 3, 3, 4, 8, 9, 9]]}
PARTS = [(size, cuts) for size, each in CUTS.items() for cuts in each]
LAYOUTS = {"NCHW": ((12, 5, 4, 4), 1), "NHWC": ((12, 4, 4, 5), -1), "NC": ((12, 5), 1)}


FUSED = {
    "plain": {},
    "residual": {"activation": "relu"},
    "mask": {},
    "renorm": {"renorm": (1.5, 0.5)},
}


def case(layout, fused):
    """Return x, dy, residual, mask, each but the first two None where not asked for."""
    shape, axis = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    x = (1e4 + rng.standard_normal(shape)).astype(np.float32)
    dy, residual = rng.standard_normal((2, *shape)).astype(np.float32)
    mask = rng.random(np.delete(shape, axis)) < 0.7
    mask[:2] = False  # all of some parts
    return x, dy, residual if fused == "residual" else None, mask if fused == "mask" else None


def trained(x, dy, residual, mask, layout, fused, comm=None):
    """Return results, gradients and running statistics of a layer after two steps."""
    bn = BatchNorm(5, axis=LAYOUTS[layout][1], comm=comm, **FUSED[fused])
    bn.gamma, bn.beta = np.arange(1.0, 6), np.arange(5.0)
    for _ in range(2):
        y = bn(x, residual, mask)
        dx = bn.backward(dy)
    dx, dresidual = dx if residual is not None else (dx, None)
    state = bn.running_mean, bn.running_var, np.array(bn.num_batches_tracked)
    return (y, dx, dresidual), (bn.grads["gamma"], bn.grads["beta"]), state


def trained_part(comm, cuts, layout, fused):
    """Return what `trained` makes on one rank, of its part."""
    parts = (
        None if each is None else np.split(each, cuts)[comm.rank] for each in case(layout, fused)
    )
    return trained(*parts, layout, fused, comm)


def assert_one_process(ranks, layout, fused):
    """Compare what `trained_part` returned on all ranks with one process, and with each other."""
    whole, grads, state = trained(*case(layout, fused), layout, fused)
    for each, wanted in enumerate(whole):
        if wanted is not None:
            found = np.concatenate([results[each] for results, *_ in ranks])
            assert np.abs(found - wanted).max() <= 1e-6 * max(1, np.abs(wanted).max())
            assert_close(found, wanted.astype(np.float64), np.float32)
    for each, wanted in enumerate(grads):
        found = np.sum([own[each] for _, own, _ in ranks], axis=0, dtype=np.float64)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    for *_, found in ranks:
        for own, first, wanted in zip(found, ranks[0][2], state, strict=True):
            np.testing.assert_array_equal(own, first)  # the same bits on every rank
            np.testing.assert_allclose(own, wanted, rtol=1e-13)
