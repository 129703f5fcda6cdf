"""The entry to the kernels: check the arguments, find memory, describe the job, have it computed.

What is wrong with the arguments is found before anything is written. The kernels get contiguous
memory (see `plan`) and per-channel values of float64.
"""

import copyreg
from copy import deepcopy

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from libcpp.vector cimport vector

from fastbn import checks
from fastbn.functional.mask import bits, by_memory, checked_mask, flatten, laid_out
from fastbn.functional.moments import Moments
from fastbn.functional.plan import plan
from fastbn.kernels import variants
from fastbn.kernels.job cimport (
    APPLY, BACKWARD, BACKWARD_FIXED, FORWARD, INFERENCE,
    BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Type,
    Job, KernelFunction, Operation, Run,
)
from fastbn.runtime.memory cimport ALIGNMENT
from fastbn.runtime.memory cimport empty_like as recycled

cnp.import_array()

include "cache.pxi"
include "arguments.pxi"
include "results.pxi"
include "tensors.pxi"

cdef enum:
    # Below this many values a call ends before another thread could take the GIL.
    SMALL = 1 << 15
    LANES = 16           # values in a pack, and signs in a word

cdef KernelFunction compute


def use_kernels(module):
    """Call the kernels of this module, one of fastbn.kernels' variants, from now on."""
    global compute
    if module.job_size != sizeof(Job):
        raise ImportError(
            f"{module.__name__}: expected a module compiled with this one, got one of another "
            f"version (a Job of {module.job_size} bytes, not {sizeof(Job)}); install fastbn again"
        )
    compute = <KernelFunction>PyCapsule_GetPointer(module.kernel, "fastbn.kernels.compute")


use_kernels(variants.kernels)

# ------------------------------------------------------------------------------------ to a kernel


cdef void describe(Cache cache, cnp.ndarray x, Job* job) noexcept:
    """Copy what the cache knows into the job; set the rest to zero."""
    memset(job, 0, sizeof(Job))
    job.type, job.itemsize = cache.type, cnp.PyArray_ITEMSIZE(x)
    job.examples, job.outer = cache.examples, cache.outer
    job.channels, job.inner, job.count = cache.channels, cache.inner, cache.count
    job.x = cnp.PyArray_DATA(x)
    job.activated, job.slope = cache.activated, cache.slope
    if cache.signs is not None:
        job.signs = <uint16_t*>cnp.PyArray_DATA(cache.signs)
    job.first_bit = cache.first_bit
    if cache.runs is not None:
        job.runs = <const Run*>cnp.PyArray_DATA(cache.runs)
        job.run_count, job.valid_count = cnp.PyArray_DIM(cache.runs, 0) - 1, <Py_ssize_t>cache.own
        if cache.valid is not None:
            job.valid = <uint16_t*>cnp.PyArray_DATA(cache.valid)
    job.gamma, job.eps = row_of(cache, GAMMA), cache.eps
    job.mean, job.mean_low = row_of(cache, MEAN), row_of(cache, MEAN_LOW)
    job.var = row_of(cache, VAR)


cdef bint call_kernel(Job* job, Operation operation) except -1:
    cdef Py_ssize_t size = job.examples * job.channels * job.inner
    cdef int failed = 0
    job.operation = operation
    if size >= SMALL:
        with nogil:
            failed = compute(job)
    elif size:
        failed = compute(job)
    if failed:
        raise MemoryError(f"fastbn: no memory for the sums of {job.channels} channels")
    return True


# ---------------------------------------------------------------------------------------- forward


cdef bint reserve_statistics(Cache cache) except -1:
    cdef cnp.npy_intp[2] shape = [GAMMA * cache.groups + ROWS - GAMMA, cache.channels]
    cache.statistics = cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)
    return True


cdef bint reserve_signs(Cache cache, cnp.ndarray result) except -1:
    """Make room for a bit for each value; those of a full, aligned pack of result share a word."""
    cdef cnp.npy_intp words
    cdef size_t line = LANES * cnp.PyArray_ITEMSIZE(result)
    cache.first_bit = (<uintptr_t>cnp.PyArray_DATA(result)) % line // cnp.PyArray_ITEMSIZE(result)
    # Reading a pack touches two words more.
    words = (cache.first_bit + cnp.PyArray_SIZE(result)) // LANES + 3
    cache.signs = cnp.PyArray_ZEROS(1, &words, cnp.NPY_UINT16, 0)
    return True


def forward(
    x, statistics, gamma, beta, axis, eps, activation, residual, mask, group_size, out,
    bint keep=True,
):
    """Normalise x: by its own statistics, or by given ones (see `copy_statistics`).

    keep tells whether the cache that is returned beside y will be used to go back.
    """
    cdef cnp.ndarray given = as_floats(x, "x"), addend = None, result
    cdef Cache cache = Cache.__new__(Cache)
    cdef Job job
    cache.eps = checked_eps(eps)
    if mask is not None:
        mask = checked_mask(mask, np.shape(given), axis)
    place_x(cache, given, axis)
    if group_size is not None:
        form_groups(cache, axis, group_size)
    if mask is not None:
        place_mask(cache, mask, axis)
        if statistics is None and cache.count == 0:
            raise ValueError(f"mask: expected valid positions, got none in shape {np.shape(mask)}")
    if statistics is None and cache.count == 0:
        raise ValueError(
            f"x: expected at least one value per channel, got shape {np.shape(given)}, axis {axis}"
        )
    set_activation(cache, activation)
    reserve_statistics(cache)
    if statistics is not None and not callable(statistics):
        copy_statistics(cache, statistics)
    cache.gamma_like = copy_parameter(cache, gamma, "gamma", GAMMA, 1)
    cache.beta_like = copy_parameter(cache, beta, "beta", BETA, 0)
    if residual is not None:
        cache.residual = True
        addend = like_x(residual, "residual", cache.x)
    if out is not None:
        check_out(out, given)
    result = target(cache, cache.x, out, addend)
    if cache.activated and keep:
        reserve_signs(cache, result)
    if callable(statistics):  # after all that can fail here: other processes may wait for it
        copy_statistics(cache, statistics(own_moments(cache)))
    describe(cache, cache.x, &job)
    job.out, job.beta = cnp.PyArray_DATA(result), row_of(cache, BETA)
    if addend is not None:
        job.residual = cnp.PyArray_DATA(addend)
    call_kernel(&job, FORWARD if statistics is None else INFERENCE)
    return deliver(cache, cache.x, result, out), cache


cdef object own_moments(Cache cache):
    """Return the Moments of the placed x, which may have no values."""
    cdef Job job
    if cache.count == 0:
        cache.statistics[:GAMMA] = 0
    else:
        describe(cache, cache.x, &job)
        call_kernel(&job, FORWARD)
    return cache.moments


def moments_of(x, axis):
    """Return the Moments of x, which may be empty."""
    cdef Cache cache = Cache.__new__(Cache)
    place_x(cache, as_floats(x, "x"), axis)
    reserve_statistics(cache)
    return own_moments(cache)


def restored(x, axis, group_size, tuple state):
    """Make the cache of a forward pass again, from the same x and what `Cache.state` was."""
    cdef Cache cache = Cache.__new__(Cache)
    place_x(cache, as_floats(x, "x"), axis)
    if group_size is not None:
        form_groups(cache, axis, group_size)
    (
        cache.statistics, cache.signs, cache.first_bit, cache.count, cache.fixed, cache.residual,
        cache.activated, cache.slope, cache.eps,
    ) = state
    return cache


# --------------------------------------------------------------------------------------- backward


# Another call with out=x may take x out of the cache meanwhile, so each of these holds x itself.


cdef cnp.ndarray place_dy(Cache cache, cnp.ndarray x, object dy):
    """Return dy in memory as x is."""
    cdef cnp.ndarray placed = like_x(dy, "dy", x)
    # Check again: converting the argument may have run user code that changed the cache.
    checked_cache(cache)
    return placed


cdef void describe_backward(
    Cache cache, cnp.ndarray x, cnp.ndarray dy, double* sums, Job* job
) noexcept:
    """Fill in what is known before dx has a place; dgamma and dbeta of each group are in sums."""
    describe(cache, x, job)
    job.dy = cnp.PyArray_DATA(dy)
    job.dgamma, job.dbeta = sums, sums + cache.groups * cache.channels


cdef tuple go_back(
    Cache cache, cnp.ndarray x, object dy, object out, double* sums, Operation operation
):
    """Return (dx, dresidual or None), not delivered yet."""
    cdef cnp.ndarray placed = place_dy(cache, x, dy), result, dresidual = None
    cdef Job job
    if out is not None:
        check_out(out, x)
    result = target(cache, x, out, placed)
    describe_backward(cache, x, placed, sums, &job)
    job.out = cnp.PyArray_DATA(result)
    if cache.residual:
        dresidual = fresh_like(x, result)
        job.dresidual = cnp.PyArray_DATA(dresidual)
    call_kernel(&job, operation)
    return result, dresidual


def backward(dy, cache, out):
    """Return (dx, dgamma, dbeta), and dresidual behind them where there was a residual."""
    cdef Cache c = checked_cache(cache)
    cdef cnp.ndarray x = x_of(c)
    cdef vector[double] sums
    if c.count != c.own:
        raise ValueError(
            f"cache: expected statistics of the {c.own:.0f} values per channel of x alone, "
            f"got those of {c.count:.0f}; use batch_norm_backward_reduce and _apply"
        )
    sums.resize(2 * c.groups * c.channels)
    dx, dresidual = go_back(c, x, dy, out, sums.data(), BACKWARD_FIXED if c.fixed else BACKWARD)
    dgamma = gradient(sums.data(), c.gamma_like, c)
    dbeta = gradient(sums.data() + c.groups * c.channels, c.beta_like, c)
    if dresidual is None:
        return deliver(c, x, dx, out), dgamma, dbeta
    dresidual = deliver(c, x, dresidual, None)
    return deliver(c, x, dx, out), dgamma, dbeta, dresidual


def backward_reduce(dy, cache):
    """Return the sums dgamma and dbeta of a part, float64."""
    cdef Cache c = checked_cache(cache, True)
    cdef cnp.ndarray x = x_of(c), placed = place_dy(c, x, dy), sums = np.zeros((2, c.channels))
    cdef Job job
    describe_backward(c, x, placed, <double*>cnp.PyArray_DATA(sums), &job)
    call_kernel(&job, BACKWARD)
    return sums[0], sums[1]


def backward_apply(dy, cache, dgamma, dbeta, out):
    """Return dx of a part by the sums of all parts, or (dx, dresidual)."""
    cdef Cache c = checked_cache(cache, True)
    cdef cnp.ndarray x = x_of(c)
    cdef vector[double] sums
    sums.resize(2 * c.channels)
    copy_values(c, dgamma, "dgamma", sums.data())
    copy_values(c, dbeta, "dbeta", sums.data() + c.channels)
    # Check again: converting the arguments may have run user code that changed the cache.
    checked_cache(c)
    dx, dresidual = go_back(c, x, dy, out, sums.data(), APPLY)
    if dresidual is not None:
        return deliver(c, x, dx, out), deliver(c, x, dresidual, None)
    return deliver(c, x, dx, out)
