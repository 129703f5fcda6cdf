"""What the tests of the demo share: short trainings on examples that are quickly learnt."""

import numpy as np

from fastbn.demo.config import configure
from fastbn.demo.data import load
from fastbn.demo.train import Trainer

QUICK = {"hidden": (8, 8), "epochs": 4, "batch_size": 16}


def trainer_for(blobs, **given):
    config = configure({**QUICK, "data": blobs, **given})
    return Trainer(config, load(config.data))


def assert_same_bits(one, other):
    """Compare all that decides how two trainings go on."""
    states = ({n: part.state_dict() for n, part in each.parts().items()} for each in (one, other))
    for (name, a), (same, b) in zip(*(state.items() for state in states), strict=True):
        assert name == same
        assert a.keys() == b.keys()
        for key, value in a.items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(b[key]), strict=True)
