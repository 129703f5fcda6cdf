"""Memory of large results, used again instead of given back to the operating system.

malloc returns a block of more than some 32 MB at once, and smaller ones when several die together.
Each page of the next one costs a fault when it is first written: more than normalising it. So a
large result lies in a `_Block`, the base of the array. When the last array or view of it dies, the
memory waits here for the next result.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks

ALIGNMENT = 128  # bytes: the largest pack, so that whole ones can be written past the cache

# By identity; what came back last is last. A block may die anywhere, also inside these functions,
# so they hold no lock: each step is one operation of the dictionary, which is atomic, and what it
# finds may be gone the next moment.
_free: dict[int, NDArray[np.uint8]] = {}
_limit = 1 << 30


class _Block:
    """Some memory that comes back when nobody uses it any more."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        _free[id(self.memory)] = self.memory
        _shrink()


def _shrink() -> None:
    """Give back what is kept beyond the limit, the oldest first."""
    for identity in list(_free):
        if kept_bytes() <= _limit:
            break
        _free.pop(identity, None)


def kept_bytes() -> int:
    """Return how much memory waits to be used again."""
    return sum(memory.nbytes for memory in list(_free.values()))


def _find(size: int) -> NDArray[np.uint8]:
    """Return memory of at least this size: some that waits, or fresh memory."""
    for identity, memory in reversed(list(_free.items())):
        # Not much too large, or a few small results would hold all the memory.
        if size <= memory.nbytes <= 1.25 * size and _free.pop(identity, None) is not None:
            return memory
    memory = np.empty(size + ALIGNMENT, np.uint8)
    address: int = memory.__array_interface__["data"][0]
    return memory[-address % ALIGNMENT :][:size]


def empty_like(array: NDArray[Any], offset: int = 0) -> NDArray[Any]:
    """Return an uninitialised array of the same shape, dtype and strides (which have no gaps).

    Its address is `offset` bytes behind a multiple of ALIGNMENT.
    """
    buffer = np.asarray(_Block(_find(array.nbytes + offset)))
    return np.ndarray(array.shape, array.dtype, buffer, offset, array.strides)


def set_recycling(max_bytes: int) -> int:
    """Set how much memory of dead results is kept for new ones.

    Results of more than 2 MiB are placed into memory that earlier ones have left, which saves the
    page faults of fresh memory. What is kept beyond the limit is given back at once.

    Parameters
    ----------
    max_bytes : int
        How much may wait to be used again: at first 1 GiB. 0 switches recycling off.

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
    before, _limit = _limit, checks.integer("max_bytes", max_bytes, least=0)
    _shrink()
    return before
