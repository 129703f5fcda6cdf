"""One message from each rank to all ranks, with a word that tells whether the rank has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.float64]
Gather: TypeAlias = Callable[[Row], Row]

TEXT = 1024  # bytes of an error's text that the other ranks are told


class Communicator(Protocol):
    """What is asked of a communicator; those of mpi4py have it."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    def Allgather(self, sendbuf: Any, recvbuf: Any, /) -> Any: ...  # noqa: D102, N802


@contextmanager
def exchange(comm: Communicator, length: int) -> Iterator[Gather]:
    """Give a function that sends a row of so many numbers, once, and returns those of all ranks.

    What fails on one rank before it sends raises on all: there as it is, on the others as a
    `RuntimeError` that names the rank.
    """
    sent = False

    def gather(row: Row) -> Row:
        nonlocal sent
        sent = True
        return _gather(comm, row, None)

    try:
        yield gather
    except Exception as error:
        if not sent:
            _gather(comm, np.zeros(length), error)
        raise


def _gather(comm: Communicator, row: Row, error: Exception | None) -> Row:
    sent, rows = np.empty(len(row) + 1), np.ones((comm.size, len(row) + 1))
    sent[:-1], sent[-1] = row, error is not None
    comm.Allgather(sent, rows)
    if rows[:, -1].any():
        failed = np.flatnonzero(rows[:, -1])
        text = "" if error is None else f"{type(error).__name__}: {error}"
        texts = np.zeros((comm.size, TEXT), np.uint8)
        comm.Allgather(np.frombuffer(text.encode()[:TEXT].ljust(TEXT), np.uint8), texts)
        if error is None:
            told = [each.tobytes().decode(errors="replace").rstrip() for each in texts[failed]]
            named = zip(failed, told, strict=True)
            raise RuntimeError("; ".join(f"rank {i} of {comm.size}: {each}" for i, each in named))
        error.add_note(f"on rank {comm.rank} of {comm.size}; the other ranks raise as well")
    return rows[:, :-1]
