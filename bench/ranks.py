"""What each rank runs for test_ranks.py: the layer alone and synchronised, and bare messages.

Rank 0 prints JSON: seconds a call, of each round, by what was measured.
"""

import json
import time

import numpy as np
from mpi4py import MPI

from fastbn import BatchNorm
from fastbn.distributed import split

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (64, 256)]
CHANNELS = [64, 256, 2048]
ROUNDS, SECONDS = 15, 0.02


def measure(comm, call):
    """Return the seconds of a call, of each round, until all ranks are through."""
    call()
    comm.Barrier()
    start = time.perf_counter()
    call()
    calls = max(1, int(SECONDS / comm.allreduce(time.perf_counter() - start, MPI.MAX)))
    found = []
    for _ in range(ROUNDS):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        comm.Barrier()
        found.append((time.perf_counter() - start) / calls)
    return found


def layer(comm, shape, synchronised):
    """Return a call of forward and backward on this rank's part of x."""
    rng = np.random.default_rng(comm.rank)
    x = rng.standard_normal(shape, dtype=np.float32)[split(shape[0], comm)]
    bn = BatchNorm(shape[1], comm=comm if synchronised else None)

    def call():
        bn.backward(bn(x))

    return call


def message(comm, values):
    """Return a call that sends so many float64 from each rank to all."""
    send, received = np.ones(values), np.empty((comm.size, values))
    return lambda: comm.Allgather(send, received)


if __name__ == "__main__":
    comm = MPI.COMM_WORLD
    found = {}
    for shape in SHAPES:
        for name, synchronised in (("alone", False), ("synchronised", True)):
            found[f"{shape} {name}"] = measure(comm, layer(comm, shape, synchronised))
    for channels in CHANNELS:
        values = 3 * channels + 2
        found[f"message of {8 * values} bytes"] = measure(comm, message(comm, values))
    if comm.rank == 0:
        print(json.dumps(found))
