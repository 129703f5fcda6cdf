"""Training on several ranks of MPI: the options, and what becomes of errors."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from fastbn.demo import DemoError, require

PATIENCE = 5  # seconds that a rank waits for the others to fail as well
# Where launchers tell a process how many it is one of.
TOLD = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def add_mpi_options(parser: argparse.ArgumentParser) -> None:
    """Add --mpi and --local-norm."""
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--mpi",
        action="store_true",
        help="train on the ranks that mpiexec started (mpiexec -n 4 python -m fastbn ... --mpi):"
        " each has a part of each minibatch; the loss curve is that of one process",
    )
    add(
        "--local-norm",
        action="store_true",
        help="with --mpi, batch norm takes the statistics of each rank's part alone",
    )


@contextmanager
def ranks(mpi: bool) -> Iterator[Any]:
    """Give the communicator of all ranks, or None without --mpi.

    Only rank 0 prints. Where all ranks fail, rank 0 tells the error; where one fails alone, it
    tells the error and ends the others.
    """
    if not mpi:
        yield None
        return
    try:
        comm = require("mpi4py.MPI", extra="mpi").COMM_WORLD
    except RuntimeError as error:  # there is no library of MPI
        raise DemoError(f'--mpi: {error}: pip install "fastbn[mpi]"') from error
    started = max(int(os.environ.get(name, 1)) for name in TOLD)
    if started > 1 and comm.size == 1:
        raise DemoError(
            f"--mpi: expected the mpiexec of the MPI that mpi4py uses, got one of another, whose"
            f" {started} processes do not find each other"
        )
    failures = comm.Dup()  # its messages do not mix with those of the training
    try:
        with redirect_stdout(StringIO() if comm.rank else sys.stdout):
            yield comm
    except KeyboardInterrupt as interrupt:
        words = [str(each) for each in interrupt.args]
        if comm.rank:  # rank 0 tells it, but for one that waits for a message, which does not end
            time.sleep(PATIENCE)
            words = [f"rank {comm.rank} of {comm.size}"]
        _end(comm, ": ".join(["interrupted", *words]), 130)
    except Exception as error:
        if not _all_come(failures):
            if not isinstance(error, DemoError):
                traceback.print_exception(error)
            _end(comm, f"error: rank {comm.rank} of {comm.size}: {error}", 2)
        if comm.rank:
            raise SystemExit(2) from None
        raise


def _all_come(failures: Any) -> bool:
    """Return whether all ranks come here, before the patience ends."""
    request, end = failures.Ibarrier(), time.monotonic() + PATIENCE
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _end(comm: Any, text: str, status: int) -> None:
    print(f"\nfastbn: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    comm.Abort(status)
    os._exit(status)  # MPICH comes back from there
