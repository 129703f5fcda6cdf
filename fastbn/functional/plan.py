"""Where the channel axis lies in memory: the (outer, channels, inner) view of an array."""

from functools import lru_cache
from math import prod

from fastbn import checks


@lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int
) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) of the memory behind an array, or None.

    The axes are taken in the order of memory, so a Fortran-ordered or channels-last array needs no
    copy: walked along its memory, it is a C-contiguous array with its axes permuted. None says that
    it is not (gaps, negative or repeated strides): copy it first.
    """
    axis = checks.axis(axis, len(shape)) % len(shape)
    by_memory = sorted(
        (i for i in range(len(shape)) if shape[i] != 1), key=lambda i: strides[i], reverse=True
    )
    expected = itemsize
    for i in reversed(by_memory):
        if strides[i] != expected and 0 not in shape:
            return None
        expected *= shape[i]
    if shape[axis] == 1:
        return 1, 1, prod(shape)
    at = by_memory.index(axis)
    outer = prod(shape[i] for i in by_memory[:at])
    inner = prod(shape[i] for i in by_memory[at + 1 :])
    return outer, shape[axis], inner
