ctypedef void (*Task)(void* job, Py_ssize_t unit) noexcept nogil

cdef int threads_for(double bytes) noexcept nogil
cdef void run_units(Task task, void* job, Py_ssize_t units, int threads) noexcept nogil
