"""Several ranks for tests: threads with a communicator of their own, or processes under mpiexec."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from importlib.util import find_spec
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
            if isinstance(error, threading.BrokenBarrierError):  # a hang
                raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in results:
        if isinstance(each, AssertionError):
            raise each
    return results


# Beside this Python first: another MPI's mpiexec would start ranks that do not find each other.
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or find_spec("mpi4py") is None,
    reason='needs mpiexec and mpi4py: pip install "fastbn[mpi]"',
)
VERSION = MPIEXEC and subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout
ENVIRONMENT = {
    # Several ranks share a CPU here, so one thread each. Open MPI asks for leave to do that, and
    # for leave to run as root.
    **dict.fromkeys(("FASTBN_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
    **dict.fromkeys(("PRTE_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
}


@contextmanager
def mpiexec(size, *words):
    """Start this Python with some words on so many ranks; kill what is left of it in the end."""
    process = subprocess.Popen(
        [MPIEXEC, "-n", str(size), sys.executable, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env={**os.environ, **ENVIRONMENT}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_mpi(size, *words, timeout=60):
    """Return status, output and errors of `mpiexec`, which may take so many seconds."""
    with mpiexec(size, *words) as process:
        out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err
