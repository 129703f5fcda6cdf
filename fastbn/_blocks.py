"""Memory of large results, used again instead of given back to the operating system.

malloc returns a block of more than some 32 MB at once, and each page of the next one costs a fault
when it is first written: more than normalising it. So a large result lies in a `_Block`, the base
of the array; when the last array or view on it dies, the memory waits here for the next result.
"""

from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64  # bytes: a cache line, and the widest vector

_lock = RLock()  # a block may die, and come back, while this very thread holds it
_free: list[NDArray[np.uint8]] = []  # the one that came back last is last
_limit = 1 << 30


class _Block:
    """Some memory that comes back when nobody uses it any more."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        _keep(self.memory)


def _keep(memory: NDArray[np.uint8]) -> None:
    with _lock:
        _free.append(memory)
        _shrink()


def _shrink() -> None:
    while _free and sum(memory.nbytes for memory in _free) > _limit:
        del _free[0]


def empty_like(array: NDArray[Any]) -> NDArray[Any]:
    """Return an uninitialised array of the same shape, dtype and strides (which have no gaps)."""
    with _lock:
        # Not much too large, or a few small results would hold all the memory.
        fitting = [
            i for i, m in enumerate(_free) if array.nbytes <= m.nbytes <= 1.25 * array.nbytes
        ]
        memory = _free.pop(fitting[-1]) if fitting else None
    if memory is None:
        memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
        memory = memory[-memory.ctypes.data % ALIGNMENT :][: array.nbytes]
    buffer = np.asarray(_Block(memory))
    return np.ndarray(array.shape, array.dtype, buffer, strides=array.strides)


def set_recycling(max_bytes: int) -> int:
    """Set how much memory of dead results is kept for new ones.

    Results of more than 32 MB are placed into memory that earlier ones have left, which saves the
    page faults of fresh memory. What is kept beyond the limit is given back at once.

    Parameters
    ----------
    max_bytes : int
        At most so many bytes wait to be used again, at first 1 GiB. 0 gives everything back and
        switches recycling off.

    Returns
    -------
    int
        The limit before.

    Raises
    ------
    TypeError, ValueError
        If `max_bytes` is not an integer of at least 0.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.set_recycling(0)  # empty it
    >>> fastbn.set_recycling(before)
    0
    """
    global _limit
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes: expected an integer, got {type(max_bytes).__name__}")
    if max_bytes < 0:
        raise ValueError(f"max_bytes: expected an integer >= 0, got {max_bytes}")
    with _lock:
        before, _limit = _limit, max_bytes
        _shrink()
    return before


def kept_bytes() -> int:
    """Return how much memory waits to be used again."""
    with _lock:
        return sum(memory.nbytes for memory in _free)
