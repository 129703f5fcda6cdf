"""Each operation: fastbn, its peers and the ceiling.

Some of it, or only some of the contenders::

    pytest bench -k "forward and nchw and 256x14x14"
    pytest bench -k "fastbn or ceiling" --benchmark-json=results.json
"""

from dataclasses import dataclass

import pytest
import selection
from contenders import CONTENDERS
from replay import replay_clock

from fastbn.cli import bench
from fastbn.cli.cases import Case


@dataclass(frozen=True)
class Entry:
    case: Case
    contender: str

    def __str__(self):
        return f"{self.case}-{self.contender}"

    def prepare(self):
        return bench.prepare(self.case, CONTENDERS[self.contender])


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    cases = selection.everything() if full else selection.default()
    cases.sort(key=lambda case: (case.layout, case.shape, case.dtype))  # which share their arrays
    entries = [
        Entry(case, name)
        for case in cases
        for name, contender in CONTENDERS.items()
        if contender.enters(case)
    ]
    metafunc.parametrize("entry", entries, ids=str)


@pytest.mark.benchmark(timer=replay_clock)
def test_operation(entry, hand_over):
    hand_over(entry)
