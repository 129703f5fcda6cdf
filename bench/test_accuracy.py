"""The error of y: over the mean of x at a standard deviation of 1, by layout, and by threads."""

from dataclasses import asdict, dataclass

import numpy as np
import pytest
from contenders import CONTENDERS

from fastbn import reference
from fastbn.cli.cases import CORES, EPS, Arrays, Case

FIRST = Case("forward", "NCHW", (32, 8, 28, 28), CORES, family="accuracy")
LAST = Case("forward", "NHWC", (32, 28, 28, 8), CORES, family="accuracy")
MEANS = (0.0, *(10.0**k for k in range(7)))
FEW = {"NCHW": (256, 3, 64, 64), "NHWC": (256, 64, 64, 3)}  # channels: many values in each


@dataclass(frozen=True)
class Entry:
    case: Case
    contender: str
    means: tuple[float, ...] = MEANS

    def __str__(self):
        return f"{self.case}-{self.contender}"

    def error(self, mean):
        """Return the largest error over the largest value, in eps."""
        case = self.case
        a = Arrays(case.layout, case.shape, case.dtype)
        a.x += np.float32(mean)
        contender = CONTENDERS[self.contender](case, a)
        ways = contender.ways()
        own = "channels_last" if case.layout == "NHWC" else "plain"  # of oneDNN's formats
        y = contender.array(ways.get(own, next(iter(ways.values())))())
        exact = (each.astype(np.float64) for each in (a.x, a.gamma, a.beta))
        wanted, _ = reference.batch_norm(*exact, axis=a.axis, eps=EPS)
        return float(abs(y - wanted).max() / abs(wanted).max() / np.finfo(np.float32).eps)


ENTRIES = [Entry(FIRST, name) for name in ("fastbn", "numpy", "torch", "jax")]
ENTRIES += [Entry(LAST, name) for name in ("torch", "tensorflow")]
ENTRIES += [
    Entry(Case("forward", layout, shape, threads, family="accuracy"), name, (0.0,))
    for layout, shape in FEW.items()
    for threads in sorted({1, CORES})
    for name in ("fastbn", "torch", "onednn")
]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_error(entry, benchmark):
    benchmark.group = "error of y"  # its times mean nothing
    errors = benchmark.pedantic(lambda: [[mean, entry.error(mean)] for mean in entry.means])
    benchmark.extra_info.update(contender=entry.contender, case=asdict(entry.case), errors=errors)
