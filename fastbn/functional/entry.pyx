"""The entry to the kernels: check the arguments, find memory, describe the job, have it computed.

What is wrong with the arguments is found before anything is written. The kernels get contiguous
memory (see `plan`) and per-channel values of float64.
"""

import numpy as np

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint16_t, uintptr_t
from libc.stdlib cimport free, malloc

from fastbn import checks
from fastbn.functional.arguments cimport (
    as_floats,
    check_like,
    check_out,
    checked_eps,
    copy_values,
    like_x,
    place_groups,
    place_x,
    set_activation,
)
from fastbn.functional.cache cimport (
    BETA,
    GAMMA,
    MEAN,
    MEAN_LOW,
    VAR,
    Cache,
    checked_cache,
    row_of,
)
from fastbn.functional.mask import Valid
from fastbn.functional.moments import check_moments
from fastbn.functional.results cimport deliver, fresh_like, gradient, may_share, target
from fastbn.kernels import variants
from fastbn.kernels.job cimport (
    APPLY,
    BACKWARD,
    BACKWARD_FIXED,
    FLOAT64,
    FORWARD,
    INFERENCE,
    Job,
    KernelFunction,
    Operation,
)

cnp.import_array()

cdef enum:
    SMALL = 1 << 15      # values: a call below is over before another thread would get the GIL
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


cdef bint describe(Cache cache, Job* job) except -1:
    """Fill in what a job has of its cache; the rest is empty."""
    job.type, job.itemsize = cache.type, cnp.PyArray_ITEMSIZE(cache.x)
    job.examples, job.outer = cache.examples, cache.outer
    job.channels, job.inner, job.count = cache.channels, cache.inner, cache.count
    job.x = cnp.PyArray_DATA(cache.x)
    job.dy = job.residual = <void*>NULL
    job.out = job.dresidual = <void*>NULL
    job.activated, job.slope = cache.activated, cache.slope
    job.signs = <uint16_t*>NULL
    if cache.signs is not None:
        job.signs = <uint16_t*>cnp.PyArray_DATA(cache.signs)
    job.first_bit = cache.first_bit
    job.gamma, job.eps = row_of(cache, GAMMA), cache.eps
    job.beta = job.dgamma = job.dbeta = <double*>NULL
    job.mean, job.mean_low = row_of(cache, MEAN), row_of(cache, MEAN_LOW)
    job.var = row_of(cache, VAR)
    job.first_statistic = 0
    return True


cdef bint call_kernel(Job* job, Operation operation) except -1:
    cdef int failed
    job.operation = operation
    if job.examples * job.channels * job.inner < SMALL:
        failed = compute(job)
    else:
        with nogil:
            failed = compute(job)
    if failed:
        raise MemoryError(f"fastbn: no memory for the sums of {job.channels} channels")
    return True


# ---------------------------------------------------------------------------------------- forward


cdef bint reserve_statistics(Cache cache) except -1:
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = GAMMA * cache.groups + BETA - GAMMA + 1, cache.channels
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


cdef bint copy_statistics(Cache cache, tuple statistics) except -1:
    """Take over given statistics: (mean, what that lost in rounding, var)."""
    cdef Py_ssize_t c
    mean, mean_low, var = statistics
    copy_values(mean, "mean", cache.channels, row_of(cache, MEAN), cache.type)
    copy_values(var, "var", cache.channels, row_of(cache, VAR), cache.type)
    cache.matrix(MEAN_LOW)[...] = mean_low
    for c in range(cache.channels):
        if row_of(cache, VAR)[c] < 0:
            raise ValueError(f"var: expected values >= 0, got {cache.var.min()}")
    cache.fixed = True
    return True


cdef cnp.ndarray copy_parameter(Cache cache, object value, str name, int which, double default):
    cdef Py_ssize_t c
    if value is not None:
        return copy_values(value, name, cache.channels, row_of(cache, which), cache.type)
    for c in range(cache.channels):
        row_of(cache, which)[c] = default
    return None


def forward(
    x, tuple statistics, gamma, beta, axis, eps, activation, residual, mask, group_size, out,
    bint keep=True,
):
    """Normalise x: by its own statistics, or by (mean, what that lost in rounding, var).

    keep tells whether the cache that is returned beside y will be used to go back.
    """
    cdef cnp.ndarray given = as_floats(x, "x"), addend = None, result
    cdef Cache cache
    cdef Job job
    if mask is not None:
        return masked_forward(
            given, statistics, gamma, beta, axis, eps, activation, residual, mask, group_size, out
        )
    cache = Cache.__new__(Cache)
    cache.eps = checked_eps(eps)
    if group_size is None:
        place_x(cache, given, axis)
    else:
        place_groups(cache, given, axis, group_size)
    cache.count = <double>cache.outer * cache.inner
    if statistics is None and cache.count == 0:
        raise ValueError(
            f"x: expected at least one value per channel, got shape {np.shape(given)}, axis {axis}"
        )
    set_activation(cache, activation)
    reserve_statistics(cache)
    if statistics is not None:
        copy_statistics(cache, statistics)
    cache.gamma_like = copy_parameter(cache, gamma, "gamma", GAMMA, 1)
    cache.beta_like = copy_parameter(cache, beta, "beta", BETA, 0)
    if residual is not None:
        cache.residual = True
        addend = like_x(residual, "residual", cache.x)
    if out is not None:
        check_out(out, given)
    result = target(out, cache.x, addend)
    if cache.activated and keep:
        reserve_signs(cache, result)
    if cnp.PyArray_SIZE(result):
        describe(cache, &job)
        job.out, job.beta = cnp.PyArray_DATA(result), row_of(cache, BETA)
        if addend is not None:
            job.residual = cnp.PyArray_DATA(addend)
        call_kernel(&job, INFERENCE if cache.fixed else FORWARD)
    if out is not None and may_share(out, cache.x):
        cache.x = None
    return deliver(result, out), cache


cdef tuple masked_forward(
    cnp.ndarray x, tuple statistics, object gamma, object beta, object axis, object eps,
    object activation, object residual, object mask, object group_size, object out,
):
    """Do as forward with the positions that the mask leaves, and put zeros at the others."""
    cdef Cache cache
    if group_size is not None:
        raise ValueError(
            f"virtual_batch_size: expected None where there is a mask, got {group_size}"
        )
    valid = Valid(mask, x, checks.axis(axis, x.ndim))
    if statistics is None and not valid.count:
        raise ValueError(f"mask: expected valid positions, got none in shape {valid.mask.shape}")
    if residual is not None:
        residual = valid.take(check_like(residual, "residual", x))
    if out is not None:
        check_out(out, x)
    y, cache = forward(
        valid.take(x), statistics, gamma, beta, valid.axis, eps, activation, residual, None, None,
        None,
    )
    cache.valid = valid
    return valid.put(y, out), cache


def normalize_part(x, moments, gamma, beta, axis, eps, activation, residual, out):
    """Normalise a part of a minibatch by the moments of all of it."""
    cdef Cache cache
    check_moments(moments, "moments", np.size(getattr(moments, "mean", ())))
    if moments.count == 0:
        raise ValueError("moments: expected those of one value per channel at least, got count 0")
    statistics = moments.mean, moments.mean_low, moments.var
    count = float(moments.count)
    y, cache = forward(
        x, statistics, gamma, beta, axis, eps, activation, residual, None, None, out
    )
    cache.fixed, cache.count = False, count
    return y, cache


def moments_of(x, axis):
    """Return the Moments of x, which may be empty."""
    cdef Cache cache = Cache.__new__(Cache)
    cdef Job job
    place_x(cache, as_floats(x, "x"), axis)
    cache.count = <double>cache.outer * cache.inner
    reserve_statistics(cache)
    if cnp.PyArray_SIZE(cache.x):
        describe(cache, &job)
        call_kernel(&job, FORWARD)
    else:
        cache.statistics[...] = 0
    return cache.moments


# --------------------------------------------------------------------------------------- backward


cdef cnp.ndarray like_given_x(Cache cache):
    """Return an array of the shape and dtype that x was given in (its values mean nothing)."""
    if cache.valid is None:
        return cache.x
    return np.broadcast_to(np.empty((), cache.x.dtype), cache.valid.shape)


cdef cnp.ndarray place_dy(Cache cache, cnp.ndarray x, object dy):
    """Return dy where it counts, in memory as x is."""
    if cache.valid is not None:
        dy = cache.valid.take(check_like(dy, "dy", like_given_x(cache)))
    return like_x(dy, "dy", x)


cdef tuple go_back(Cache cache, object dy, object out, double* sums, Operation operation):
    """Return (dx, dresidual or None); dgamma and then dbeta of each group go into sums."""
    cdef cnp.ndarray x = cache.x, memory, result, dresidual = None
    cdef Py_ssize_t i
    cdef Job job
    memory = place_dy(cache, x, dy)
    checked_cache(cache)  # once more: to make an array of dy may have run anything
    if out is not None:
        check_out(out, like_given_x(cache))
    result = target(out if cache.valid is None else None, x, memory)
    if cache.residual:
        dresidual = fresh_like(x, result)
    if cnp.PyArray_SIZE(memory):
        describe(cache, &job)
        job.dy, job.out = cnp.PyArray_DATA(memory), cnp.PyArray_DATA(result)
        if dresidual is not None:
            job.dresidual = cnp.PyArray_DATA(dresidual)
        job.dgamma, job.dbeta = sums, sums + cache.groups * cache.channels
        call_kernel(&job, operation)
    elif operation != APPLY:
        for i in range(2 * cache.groups * cache.channels):
            sums[i] = 0
    if out is not None and may_share(out, x):
        cache.x = None
    if cache.valid is None:
        return deliver(result, out), dresidual
    return (
        cache.valid.put(result, out), None if dresidual is None else cache.valid.put(dresidual)
    )


cdef double* new_sums(Cache cache) except NULL:
    """Return memory for dgamma and dbeta of each group."""
    cdef double* sums = <double*>malloc((2 * cache.groups * cache.channels + 1) * sizeof(double))
    if sums == NULL:
        raise MemoryError(f"fastbn: no memory for the gradients of {cache.channels} channels")
    return sums


def backward(dy, cache, out):
    """Return (dx, dgamma, dbeta), and dresidual behind them where there was a residual."""
    cdef Cache c = checked_cache(cache)
    cdef double* sums
    if c.count != c.outer * c.inner:
        raise ValueError(
            f"cache: expected statistics of the {c.outer * c.inner} values per channel of x alone, "
            f"got those of {c.count:.0f}; use batch_norm_backward_reduce and _apply"
        )
    sums = new_sums(c)
    try:
        dx, dresidual = go_back(c, dy, out, sums, BACKWARD_FIXED if c.fixed else BACKWARD)
        dgamma = gradient(sums, c.gamma_like, c)
        dbeta = gradient(sums + c.groups * c.channels, c.beta_like, c)
    finally:
        free(sums)
    return (dx, dgamma, dbeta) if dresidual is None else (dx, dgamma, dbeta, dresidual)


def backward_reduce(dy, cache):
    """Return the sums dgamma and dbeta of a part, float64."""
    cdef Cache c = checked_cache(cache, True)
    cdef cnp.ndarray x = c.x, memory = place_dy(c, x, dy), sums = np.zeros((2, c.channels))
    cdef Job job
    checked_cache(c)  # once more: to make an array of dy may have run anything
    if cnp.PyArray_SIZE(memory):
        describe(c, &job)
        job.dy = cnp.PyArray_DATA(memory)
        job.dgamma = <double*>cnp.PyArray_DATA(sums)
        job.dbeta = job.dgamma + c.channels
        call_kernel(&job, BACKWARD)
    return sums[0], sums[1]


def backward_apply(dy, cache, dgamma, dbeta, out):
    """Return dx of a part by the sums of all parts, or (dx, dresidual)."""
    cdef Cache c = checked_cache(cache, True)
    cdef double* sums = new_sums(c)
    try:
        copy_values(dgamma, "dgamma", c.channels, sums, FLOAT64)
        copy_values(dbeta, "dbeta", c.channels, sums + c.channels, FLOAT64)
        checked_cache(c)  # once more: to make arrays of them may have run anything
        dx, dresidual = go_back(c, dy, out, sums, APPLY)
    finally:
        free(sums)
    return dx if dresidual is None else (dx, dresidual)
