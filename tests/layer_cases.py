"""What the tests of the layers share."""

import numpy as np


def snapshot(bn):
    return {**bn.state_dict(), **{f"grad of {name}": g.copy() for name, g in bn.grads.items()}}


def assert_unchanged(bn, before):
    after = snapshot(bn)
    assert after.keys() == before.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
