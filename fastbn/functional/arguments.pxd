cimport numpy as cnp

from fastbn.functional.cache cimport Cache
from fastbn.kernels.job cimport Type

cdef enum:
    OTHER = -1  # a type that kernels do not take

cdef int type_of(cnp.ndarray array)
cdef cnp.ndarray as_floats(object value, str name)
cdef cnp.ndarray check_like(object value, str name, cnp.ndarray x)
cdef cnp.ndarray like_x(object value, str name, cnp.ndarray x)
cdef bint check_out(object out, cnp.ndarray x) except -1
cdef double checked_eps(object eps) except -1
cdef bint set_activation(Cache cache, object activation) except -1
cdef bint place_x(Cache cache, cnp.ndarray x, object axis) except -1
cdef bint place_groups(Cache cache, cnp.ndarray x, object axis, object size) except -1
cdef cnp.ndarray copy_values(
    object value, str name, Py_ssize_t channels, double* values, Type x_type
)
cdef cnp.ndarray float64s(Py_ssize_t count, double* values)


cdef inline bint is_ready(cnp.ndarray array):
    """Whether the kernels can read the elements as they are."""
    return cnp.PyArray_ISALIGNED(array) and cnp.PyArray_ISNOTSWAPPED(array)


cdef inline bint same_memory_order(cnp.ndarray a, cnp.ndarray b):
    """Whether two arrays of one shape can be walked side by side, element by element."""
    cdef int i
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i):
            return False
    return True
