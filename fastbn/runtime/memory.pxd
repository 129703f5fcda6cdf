cimport numpy as cnp
from libc.stdint cimport uintptr_t

cdef enum:
    ALIGNMENT = 128  # bytes: the largest pack, so that whole ones can be written past the cache

cdef cnp.ndarray empty_like(cnp.ndarray array, uintptr_t offset)
