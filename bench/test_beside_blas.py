"""Batch norm taking turns with a matrix product, as in a training loop.

Where the threads of the one wait for those of the other, they take longer in turns than apart.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from contenders import CONTENDERS
from replay import replay_clock

from fastbn.cli.cases import CORES, Arrays, Case

TIMES = 8
SIZES = [256, 512, 1024]
OPERATIONS = ("matmul_in_turns", "matmul_apart")


@dataclass(frozen=True)
class Entry:
    case: Case
    contender: str

    def __str__(self):
        return f"{self.case}-{self.contender}"

    def prepare(self):
        case = self.case
        arrays = Arrays(case.layout, case.shape, case.dtype)
        a, b = np.random.default_rng(1).standard_normal((2, *case.shape), dtype=np.float32)
        matmul = partial(np.matmul, a, b, out=arrays.x)
        matmul()
        contender = CONTENDERS[self.contender](case, arrays)
        (*_, forward), (*_, backward) = (
            each().values() for each in (contender.forward, contender.backward)
        )

        def in_turns():
            for _ in range(TIMES):
                matmul()
                forward()
                backward()

        def apart():
            for _ in range(TIMES):
                matmul()
            for _ in range(TIMES):
                forward()
                backward()

        return in_turns if case.operation == OPERATIONS[0] else apart


ENTRIES = [
    Entry(Case(operation, "NC", (size, size), CORES, family="beside BLAS"), contender)
    for size in SIZES
    for operation in OPERATIONS
    for contender in ("fastbn", "torch")
]


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_beside_blas(entry, hand_over):
    hand_over(entry)
