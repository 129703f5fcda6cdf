# The description of one call, for Cython: job.hpp says what each field means.

from libc.stdint cimport uint16_t

cdef extern from "job.hpp" namespace "fastbn" nogil:
    cdef enum Type:
        FLOAT32
        FLOAT64
        FLOAT16
        BFLOAT16

    cdef enum Operation:
        FORWARD
        INFERENCE
        BACKWARD
        BACKWARD_FIXED
        APPLY

    cdef struct Run:
        Py_ssize_t position
        Py_ssize_t before

    cdef struct Job:
        Operation operation
        Type type
        Py_ssize_t itemsize
        Py_ssize_t examples
        Py_ssize_t outer
        Py_ssize_t channels
        Py_ssize_t inner
        double count
        const void* x
        const void* dy
        void* out
        const void* residual
        void* dresidual
        bint activated
        double slope
        uint16_t* signs
        Py_ssize_t first_bit
        const Run* runs
        const uint16_t* valid
        Py_ssize_t run_count
        Py_ssize_t valid_count
        Py_ssize_t first_position
        Py_ssize_t valid_before
        const double* gamma
        const double* beta
        double eps
        double* mean
        double* mean_low
        double* var
        double* dgamma
        double* dbeta
        Py_ssize_t first_statistic
        bint past_cache
        bint residual_past_cache

# Returns 0, or -1 where there is no memory for partial sums; nothing is written then.
ctypedef int (*KernelFunction)(Job*) noexcept nogil
