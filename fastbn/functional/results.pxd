cimport numpy as cnp

from fastbn.functional.cache cimport Cache

cdef cnp.ndarray fresh_like(cnp.ndarray memory, cnp.ndarray beside=*)
cdef bint may_share(cnp.ndarray a, cnp.ndarray b)
cdef cnp.ndarray target(object out, cnp.ndarray memory, cnp.ndarray other)
cdef object deliver(cnp.ndarray result, object out)
cdef cnp.ndarray gradient(double* values, cnp.ndarray like, Cache cache)
