ctypedef void (*Task)(void* work, Py_ssize_t chunk) noexcept nogil

cdef int threads_for(double bytes) noexcept nogil
cdef void share_out(Task task, void* work, Py_ssize_t chunks, int threads) noexcept nogil
