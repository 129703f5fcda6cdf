"""Batch norm taking turns with a matrix product, as in a training loop.

Where the threads of the one wait for those of the other, a round takes longer than both alone.
"""

from statistics import median

import numpy as np
import pytest
from peers import PEERS
from race import fastest, race, replay, replay_clock
from workloads import CORES, Data, Workload


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize("contender", ["fastbn", "torch"])
def test_beside_blas(contender, size, benchmark):
    d = Data(Workload("beside BLAS", "NC", (size, size)))
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))

    def matmul():
        np.matmul(a, b, out=d.x)

    matmul()  # before the peer computes the statistics of d.x
    try:
        peer = PEERS[contender](d, CORES)
    except ImportError as problem:
        pytest.skip(f"{contender}: {problem}")
    ways = [step(np.empty_like(d.x)) for step in (peer.forward, peer.backward)]
    forward, backward = (way[fastest(way)] for way in ways)

    def both():
        forward()
        backward()

    def in_turns():
        matmul()
        both()

    calls = {"matmul": matmul, "batch norm": both, "in turns": in_turns}
    if not benchmark.enabled:
        calls = {}
        in_turns()
    durations = race(calls)
    benchmark.group = f"beside BLAS {size}"
    benchmark.extra_info = {"contender": contender, "size": size, "threads": CORES}
    if durations:
        alone = median(durations["matmul"]) + median(durations["batch norm"])
        benchmark.extra_info["ratio_to_alone"] = median(durations["in turns"]) / alone
    replay(benchmark, durations.get("in turns", ()))
