"""Several ranks for tests: threads with a communicator of their own, or processes under mpiexec."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest


class Threads:
    """A communicator whose ranks are threads of this process, and counts its messages."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared, self.messages = rank, size, shared, 0

    def _meet(self, buffer):
        """Return what all ranks bring, in their order."""
        barrier, buffers = self.shared
        self.messages += 1
        buffers[self.rank] = np.array(buffer)
        barrier.wait()
        found = [buffers[rank] for rank in range(self.size)]
        barrier.wait()
        assert len({each.nbytes for each in found}) == 1  # MPI would mix them up
        return found

    def Allgather(self, send, recv):  # noqa: N802
        recv[...] = np.reshape(self._meet(send), recv.shape)

    def Alltoall(self, send, recv):  # noqa: N802
        recv[...] = [each[self.rank] for each in self._meet(send)]

    def Bcast(self, buffer, root):  # noqa: N802
        buffer[...] = self._meet(buffer)[root]


def on_ranks(size, function):
    """Return what ``function(comm)`` returns, or raises, on each of so many ranks."""
    shared, results = (threading.Barrier(size, timeout=10), {}), [None] * size

    def run(rank):
        try:
            results[rank] = function(Threads(rank, size, shared))
        except Exception as error:
            results[rank] = error
            if isinstance(error, threading.BrokenBarrierError):
                raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
