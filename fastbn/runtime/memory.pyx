"""Memory of results, used again instead of given back to the operating system.

malloc returns large blocks at once, and smaller ones when they lie at its end. Each page of the
next one costs a fault when it is first written: more than normalising it. So a result lies in the
memory of a `Block`, the base of the array. When the last array or view of it dies, the memory waits
here for the next result.
"""

cimport cython
cimport numpy as cnp
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uintptr_t

import numpy as np

from fastbn import checks
from fastbn.runtime import limits

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(  # takes a reference to descr
        type subtype, cnp.dtype descr, int nd, cnp.npy_intp* dims, cnp.npy_intp* strides,
        void* data, int flags, object obj,
    )

cnp.import_array()

# What waits, by size. A block may die anywhere, also inside these functions, so they hold no lock:
# each step is one operation of a list or a dictionary, and what it finds may be gone the next
# moment. The lists stay when they are empty.
cdef dict waiting = {}
cdef Py_ssize_t kept = 0
cdef Py_ssize_t limit = min(1 << 30, limits.usable_memory() // 8)


@cython.final
@cython.no_gc
cdef class Block:
    """Some memory that comes back when nobody uses it any more."""

    cdef cnp.ndarray memory

    def __del__(self):
        if self.memory is not None:  # there was enough for it
            keep(self.memory)


cdef void count(Py_ssize_t bytes):
    """Add to what is kept; a Python without a GIL needs this to be one step."""
    global kept
    with cython.critical_section(waiting):
        kept += bytes


cdef void keep(cnp.ndarray memory):
    cdef list stack = waiting.get(cnp.PyArray_NBYTES(memory))
    try:
        if stack is None:
            stack = waiting.setdefault(cnp.PyArray_NBYTES(memory), [])
        stack.append(memory)
    except MemoryError:
        return  # then malloc has it back
    count(cnp.PyArray_NBYTES(memory))
    if kept > limit:
        shrink()


cdef cnp.ndarray pop(list stack, Py_ssize_t index):
    """Take memory out of a list, or return None if there is none any more."""
    cdef cnp.ndarray memory
    try:
        memory = stack.pop(index)
    except IndexError:
        return None
    count(-cnp.PyArray_NBYTES(memory))
    return memory


cdef void shrink():
    """Give back what is kept beyond the limit: of each size the oldest first."""
    for stack in list(waiting.values()):
        while kept > limit and pop(stack, 0) is not None:
            pass


def kept_bytes():
    """Return how much memory waits to be used again."""
    return kept


cdef Py_ssize_t rounded_up(Py_ssize_t size):
    """Return the size of the block for a result: an eighth more at most, so that others fit too."""
    cdef Py_ssize_t step = 1
    while step << 4 <= size:
        step <<= 1
    return (size + step - 1) & -step


cdef cnp.ndarray empty_like(cnp.ndarray array, uintptr_t offset):
    """Return an uninitialised array of the same shape, dtype and strides (which have no gaps).

    Its address is `offset` bytes behind a multiple of ALIGNMENT.
    """
    cdef cnp.npy_intp size = rounded_up(cnp.PyArray_NBYTES(array) + offset + ALIGNMENT)
    cdef list stack = waiting.get(size)
    cdef Block block = Block.__new__(Block)
    cdef cnp.ndarray result
    cdef uintptr_t start
    if stack:
        block.memory = pop(stack, -1)
    if block.memory is None:
        block.memory = cnp.PyArray_EMPTY(1, &size, cnp.NPY_UINT8, 0)
    start = <uintptr_t>cnp.PyArray_DATA(block.memory)
    start = (start + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT + offset
    Py_INCREF(array.descr)
    result = PyArray_NewFromDescr(
        np.ndarray, array.descr, cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array),
        cnp.PyArray_STRIDES(array), <void*>start, cnp.NPY_ARRAY_WRITEABLE, None,
    )
    cnp.set_array_base(result, block)
    return result


def set_recycling(max_bytes):
    """Set how much memory of dead results is kept for new ones.

    Results of more than 32 KiB are placed into memory that earlier ones have left, which saves the
    page faults of fresh memory. What is kept beyond the limit is given back at once. Such a result
    does not own its memory, so that `numpy.ndarray.resize` refuses it; `numpy.resize` copies.

    Parameters
    ----------
    max_bytes : int
        How much may wait to be used again: at first an eighth of the memory that this process may
        use (of the machine, or of its control group), and at most 1 GiB. 0 switches recycling off.

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
    global limit
    cdef Py_ssize_t before = limit
    limit = min(checks.integer("max_bytes", max_bytes, least=0), 1 << 62)
    if kept > limit:
        shrink()
    return before
