"""What a call costs where the arithmetic costs next to nothing: x of shape (64, 64), one thread."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from peers import PEERS
from race import replay_clock
from workloads import Workload, data

import fastbn

SMALL = Workload("small call", "NC", (64, 64))


def of_peer(name):
    (call,) = PEERS[name](data(SMALL), threads=1).forward(None).values()
    return call


def numpy_add():
    x = data(SMALL).x
    return partial(np.add, x, x)


def fastbn_layer():
    fastbn.set_num_threads(1)
    return partial(fastbn.BatchNorm(64), data(SMALL).x)


def torch_layer():
    import torch

    torch.set_num_threads(1)
    layer, x = torch.nn.BatchNorm1d(64), torch.from_numpy(data(SMALL).x)

    def call():
        with torch.no_grad():
            layer(x)

    return call


@dataclass(frozen=True)
class Heat:
    name: str

    def __str__(self):
        return self.name

    def prepare(self, entry):
        return entry.make(), {"small": self.name, "contender": entry.contender}


@dataclass(frozen=True)
class Entry:
    heat: Heat
    contender: str
    make: object

    def __str__(self):
        return f"{self.heat}-{self.contender}"


FUNCTION, LAYER = Heat("function"), Heat("layer")
ENTRIES = [
    Entry(FUNCTION, "numpy.add", numpy_add),
    Entry(FUNCTION, "fastbn.batch_norm", partial(of_peer, "fastbn")),
    Entry(FUNCTION, "torch.native_batch_norm", partial(of_peer, "torch")),
    Entry(LAYER, "fastbn.BatchNorm", fastbn_layer),
    Entry(LAYER, "torch.nn.BatchNorm1d", torch_layer),
]


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_small_call(entry, hand_over):
    hand_over(entry)
