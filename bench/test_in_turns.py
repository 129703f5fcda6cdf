"""Batch norm taking turns with something else, as in a training loop.

A matrix product: where the threads of the one wait for those of the other, they take longer in
turns than apart. A reader of the result (`np.maximum`): a norm that writes past the cache leaves
the reader to fetch from memory; the ceiling is copying (or adding) and its reader.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from contenders import CONTENDERS
from replay import replay_clock

from fastbn.cli import bench
from fastbn.cli.cases import CORES, FEW, Arrays, Case, images

TIMES = 8
SIZES = [256, 512, 1024]  # of square matrices
CALLS = [(64, 28), (128, 28), (64, 56)]  # norms of 6, 13 and 26 MB


def alternate(*calls, times=1):
    for _ in range(times):
        for call in calls:
            call()


@dataclass(frozen=True)
class Entry:
    case: Case
    contender: str

    def __str__(self):
        return f"{self.case}-{self.contender}"

    def prepare(self):
        case, contender = self.case, CONTENDERS[self.contender]
        what, _, how = case.operation.partition("_")
        if how == "and_reader":
            alone = replace(case, operation=what)
            call, out = bench.prepare(alone, contender), alone.arrays.out
            return partial(alternate, call, partial(np.maximum, out, 0, out=np.empty_like(out)))
        size = int(what.removeprefix("matmul"))
        a, b = np.random.default_rng(1).standard_normal((2, size, size), dtype=np.float32)
        matmul = partial(np.matmul, a, b, out=np.empty_like(a))
        of_case = contender(case, Arrays(case.layout, case.shape, case.dtype))
        norm = [next(iter(each().values())) for each in (of_case.forward, of_case.backward)]
        if how == "in_turns":
            return partial(alternate, matmul, *norm, times=TIMES)
        return lambda: (alternate(matmul, times=TIMES), alternate(*norm, times=TIMES))


ENTRIES = [
    Entry(Case(f"matmul{size}_{how}", layout, shape, CORES, family="beside BLAS"), contender)
    for size in SIZES
    for layout, shape in [("NC", (size, size)), *(("NCHW", (32, c, h, h)) for c, h in CALLS)]
    for how in ("in_turns", "apart")
    for contender in ("fastbn", "torch")
] + [
    Entry(replace(case, family="and its reader"), contender)
    for layout in ("NCHW", "NHWC")
    for what in ("forward", "backward")
    for case in images(f"{what}_and_reader", layout, 1, FEW)
    for contender in ("ceiling", "fastbn")
]


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_in_turns(entry, hand_over):
    hand_over(entry)
