cimport cython
cimport numpy as cnp

from fastbn.kernels.job cimport Type

# The rows of a cache's statistics; those before GAMMA have one for each group.
cdef enum:
    MEAN
    MEAN_LOW
    VAR
    GAMMA
    BETA  # only while y is computed


@cython.final
cdef class Cache:
    cdef cnp.ndarray statistics  # float64: means, their low parts, vars, gamma
    cdef cnp.ndarray x           # in memory as the kernels want it; None once out= overwrote it
    cdef Type type
    cdef Py_ssize_t examples
    cdef Py_ssize_t outer        # of these in a group
    cdef Py_ssize_t channels
    cdef Py_ssize_t inner
    cdef double count            # values of a channel that the statistics are of
    cdef double eps
    cdef Py_ssize_t groups
    cdef bint grouped
    cdef bint fixed              # the statistics were given, so they are constants
    cdef bint residual           # there was one
    cdef bint activated
    cdef double slope            # of the activation below 0
    cdef cnp.ndarray signs       # a bit for each value: whether it was above 0 there (see Job)
    cdef Py_ssize_t first_bit
    cdef object valid            # the positions of x that a mask has left (see mask.py), or None
    cdef cnp.ndarray gamma_like  # has the shape and dtype of the gradient; None: (C,), as x
    cdef cnp.ndarray beta_like
    cdef object matrix(self, int which)
    cdef object counts(self)


cdef inline double* row_of(Cache cache, int which) noexcept:
    """Return a row of the statistics, that of the first group."""
    cdef Py_ssize_t row = GAMMA * cache.groups + which - GAMMA
    if which < GAMMA:
        row = which * cache.groups
    return <double*>cnp.PyArray_DATA(cache.statistics) + row * cache.channels


cdef Cache checked_cache(object cache, bint one_group=*)
