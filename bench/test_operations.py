"""Forward, backward and inference: fastbn, its peers and the ceiling over all workloads.

Some of it, or only some of the contenders::

    pytest bench -k "forward and nchw and 256x14x14"
    pytest bench -k "fastbn or ceiling" --benchmark-json=results.json
"""

from dataclasses import dataclass

import numpy as np
import pytest
from peers import PEERS
from race import fastest, replay_clock
from workloads import THREADS, WORKLOADS, Workload, data

# Arrays read and written at least. The backward pass that has a residual writes two.
MOVED = {
    "forward": 2, "backward": 3, "inference": 2,
    "forward_relu": 2, "backward_relu": 3, "forward_add_relu": 3, "backward_add_relu": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Heat:
    workload: Workload
    operation: str
    threads: int
    output: str

    def __str__(self):
        return f"{self.operation}-{self.workload}-t{self.threads}-{self.output}"

    def prepare(self, entry):
        d = data(self.workload)
        peer = PEERS[entry.contender](d, self.threads)
        out = np.empty_like(d.x) if self.output == "out" else None
        ways = getattr(peer, self.operation)(out)
        errors = {}
        for name, call in ways.items():
            result = peer.array(call())
            if result is not None:
                errors[name] = d.error(self.operation, result)
                assert errors[name] * d.eps < max(1e-2, 2 * d.eps), f"{entry}: wrong result"
        way = fastest(ways)
        return ways[way], {
            "family": self.workload.family,
            "layout": self.workload.layout,
            "shape": self.workload.shape,
            "dtype": self.workload.dtype,
            "count": self.workload.count,
            "operation": self.operation,
            "threads": self.threads,
            "output": self.output,
            "contender": entry.contender,
            "way": way,
            "error_eps": errors.get(way),
            "bytes": MOVED[self.operation] * d.x.nbytes,
        }


@dataclass(frozen=True)
class Entry:
    heat: Heat
    contender: str

    def __str__(self):
        return f"{self.heat}-{self.contender}"


ENTRIES = [
    Entry(Heat(workload, operation, threads, output), name)
    for workload in WORKLOADS
    for threads in THREADS
    for operation in MOVED
    for output in ("out", "fresh")
    for name, peer in PEERS.items()
    if peer.enters(workload, operation, output)
]


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_operation(entry, hand_over):
    hand_over(entry)
