"""What makes the ranks replicas of each other: the same parameters, parts of the examples."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastbn import checks
from fastbn.layers.collective import exchange


def broadcast(layers: Iterable[Any], comm: Any, root: int = 0) -> None:
    """Give all ranks the parameters and running statistics that one rank has.

    Parameters
    ----------
    layers : iterable of layers
        Anything with `state_dict` and `load_state_dict`, so optimizers too.
    comm : communicator
        Of mpi4py, or any object with `rank`, `size`, ``Allgather(send, recv)`` and
        ``Bcast(buffer, root)``.
    root : int
        The rank that has them.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the layers of the ranks have other entries, shapes or
        dtypes. Nothing is changed then.
    RuntimeError
        If it failed on another rank.
    """
    checks.communicator("comm", comm, "Bcast")
    root = checks.integer("root", root, 0, comm.size - 1)
    with exchange(comm, 2) as gather:
        layers = list(checks.iterator("layers", layers))
        states = [dict(layer.state_dict()) for layer in layers]
        entries = [(state, key, np.asarray(state[key])) for state in states for key in state]
        for _, key, array in entries:
            if array.dtype.hasobject:
                raise TypeError(f"{key}: expected numbers, got {array.dtype}")
        told = [(key, array.dtype.str, array.shape) for _, key, array in entries]
        rows = gather(np.array([len(entries), zlib.crc32(repr(told).encode())], np.float64))
    other = np.flatnonzero((rows != rows[root]).any(axis=1)).tolist()
    if other:
        raise ValueError(f"layers: expected those of rank {root} on all, got others on {other}")
    buffer = np.frombuffer(b"".join(array.tobytes() for *_, array in entries), np.uint8).copy()
    comm.Bcast(buffer, root)
    start = 0
    for state, key, array in entries:
        stop = start + array.nbytes
        state[key] = buffer[start:stop].view(array.dtype).reshape(array.shape)
        start = stop
    for layer, state in zip(layers, states, strict=True):
        layer.load_state_dict(state)


def split(n: int, comm: Any) -> slice:
    """Return which of n examples are this rank's: parts in the order of ranks, as even as can be.

    Parameters
    ----------
    n : int
        How many examples there are. With less than ranks, some have none.
    comm : communicator
        Of mpi4py, or any object with `rank` and `size`.

    Raises
    ------
    TypeError, ValueError
        If n is no integer >= 0.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from fastbn.distributed import split
    >>> [split(10, SimpleNamespace(rank=rank, size=4)) for rank in range(4)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None), slice(8, 10, None)]
    """
    each, more = divmod(checks.integer("n", n, 0), comm.size)
    start = comm.rank * each + min(comm.rank, more)
    return slice(start, start + each + (comm.rank < more))
