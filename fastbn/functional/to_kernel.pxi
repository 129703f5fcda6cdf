# From arguments that are checked, to the kernel and back.


cdef bint call_kernel(
    Cache cache, Operation operation, Job* job, cnp.ndarray x, cnp.ndarray result
) except -1:
    """Fill in what every operation needs, and run it; without a result nothing is written."""
    cdef int failed
    job.operation = operation
    job.first_statistic = 0
    job.type = cache.type
    job.itemsize = cnp.PyArray_ITEMSIZE(x)
    job.examples, job.outer = cache.examples, cache.outer
    job.channels, job.inner = cache.channels, cache.inner
    job.count = cache.count
    job.x = cnp.PyArray_DATA(x)
    job.out = NULL if result is None else cnp.PyArray_DATA(result)
    job.activated, job.slope = cache.activated, cache.slope
    job.signs = NULL
    if cache.signs is not None:
        job.signs = <uint16_t*>cnp.PyArray_DATA(cache.signs)
    job.first_bit = cache.first_bit
    job.gamma = cache.row(GAMMA)
    job.eps = cache.eps
    job.mean, job.mean_low, job.var = cache.row(MEAN), cache.row(MEAN_LOW), cache.row(VAR)
    if cnp.PyArray_SIZE(x) < SMALL:
        failed = run(job)
    else:
        with nogil:
            failed = run(job)
    if failed:
        raise MemoryError(f"fastbn: no memory for the sums of {cache.channels} channels")
    return True


cdef bint take_signs(Cache cache, cnp.ndarray result) except -1:
    """Make room for a bit for each value; those of a full, aligned pack of result share a word."""
    cdef cnp.npy_intp words
    cdef size_t line = LANES * cnp.PyArray_ITEMSIZE(result)
    cache.first_bit = (<uintptr_t>cnp.PyArray_DATA(result)) % line // cnp.PyArray_ITEMSIZE(result)
    # Reading a pack touches two words more.
    words = (cache.first_bit + cnp.PyArray_SIZE(result)) // LANES + 3
    cache.signs = cnp.PyArray_ZEROS(1, &words, cnp.NPY_UINT16, 0)
    return True


cdef tuple forward(
    object x, object statistics, object gamma, object beta, object axis, object eps,
    object activation, object residual, object group_size, object out, bint keep=True,
):
    """Normalise x: by its own statistics, or by (mean, what that lost in rounding, var).

    keep tells whether the cache that is returned beside y will be used to go back.
    """
    cdef cnp.ndarray given = as_floats(x, "x"), addend = None, result
    cdef Cache cache = Cache.__new__(Cache)
    cdef cnp.npy_intp shape[2]
    cdef Py_ssize_t c
    cdef double* shift
    cdef Job job
    cache.eps = checked_eps(eps)
    if group_size is None:
        take_x(cache, given, axis)
    else:
        take_groups(cache, given, axis, group_size)
    cache.count = <double>cache.outer * cache.inner
    if statistics is None and cache.count == 0:
        raise ValueError(
            f"x: expected at least one value per channel, got shape {np.shape(given)}, axis {axis}"
        )
    take_activation(cache, activation)
    shape[0], shape[1] = GAMMA * cache.groups + BETA - GAMMA + 1, cache.channels
    cache.statistics = cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)
    if statistics is not None:
        cache.fixed = True
        mean, mean_low, var = statistics
        for name, value, which in (("mean", mean, MEAN), ("var", var, VAR)):
            if value is None:
                raise TypeError(
                    f"{name}: expected {cache.channels} value(s), one per channel, got None"
                )
            take_values(value, name, cache.channels, cache.row(which), cache.type)
        cache.matrix(MEAN_LOW)[...] = mean_low
        for c in range(cache.channels):
            if cache.row(VAR)[c] < 0:
                raise ValueError(f"var: expected values >= 0, got {cache.var.min()}")
    if gamma is None:
        for c in range(cache.channels):
            cache.row(GAMMA)[c] = 1
    else:
        cache.gamma_like = take_values(
            gamma, "gamma", cache.channels, cache.row(GAMMA), cache.type
        )
    shift = cache.row(BETA)
    if beta is None:
        for c in range(cache.channels):
            shift[c] = 0
    else:
        cache.beta_like = take_values(beta, "beta", cache.channels, shift, cache.type)
    if residual is not None:
        cache.residual = True
        addend = like_x(residual, "residual", cache.x)
    if out is not None:
        check_out(out, given)
    result = target(out, cache.x, addend)
    if cache.activated and keep:
        take_signs(cache, result)
    if cnp.PyArray_SIZE(result):
        job.dy = job.dresidual = NULL
        job.residual = NULL if addend is None else cnp.PyArray_DATA(addend)
        job.beta = shift
        call_kernel(cache, INFERENCE if cache.fixed else FORWARD, &job, cache.x, result)
    if out is not None and may_share(out, cache.x):
        cache.x = None
    return deliver(result, out), cache


cdef tuple masked_forward(
    object x, object statistics, object gamma, object beta, object axis, object eps,
    object activation, object residual, object mask, object out,
):
    """Do as forward with the positions that the mask leaves, and put zeros at the others."""
    cdef cnp.ndarray given = as_floats(x, "x")
    cdef Cache cache
    axis = checked_axis(axis, given)
    valid = Valid(mask, given, axis)
    if statistics is None and not valid.count:
        raise ValueError(f"mask: expected valid positions, got none in shape {valid.mask.shape}")
    if residual is not None:
        residual = valid.take(check_like(residual, "residual", given))
    if out is not None:
        check_out(out, given)
    y, cache = forward(
        valid.take(given), statistics, gamma, beta, valid.axis, eps, activation, residual, None,
        None,
    )
    cache.valid = valid
    return valid.put(y, out), cache


cdef Cache checked_cache(object cache, bint one_group=False):
    if type(cache) is not Cache:
        raise TypeError(
            f"cache: expected what batch_norm returned beside y, got {type(cache).__name__}"
        )
    if (<Cache>cache).x is None:
        raise ValueError(
            "cache: x is needed for the gradients, but out= has overwritten it; "
            "give another array as out"
        )
    if one_group and (<Cache>cache).grouped:
        raise ValueError("cache: expected one group of examples; use batch_norm_backward")
    return cache


cdef cnp.ndarray whole(Cache cache):
    """Return an array of the shape and dtype that x was given in (its values mean nothing)."""
    if cache.valid is None:
        return cache.x
    return np.broadcast_to(np.empty((), cache.x.dtype), cache.valid.shape)


cdef cnp.ndarray take_dy(Cache cache, cnp.ndarray x, object dy):
    """Return dy where it counts, in memory as x is."""
    if cache.valid is not None:
        dy = cache.valid.take(check_like(dy, "dy", whole(cache)))
    return like_x(dy, "dy", x)


cdef object backward(
    object dy, object cache, object out, object dgamma, object dbeta, Operation operation
):
    """Go back: BACKWARD returns all gradients, APPLY dx by given sums (and dresidual)."""
    cdef Cache c = checked_cache(cache, operation == APPLY)
    cdef cnp.ndarray x = c.x, memory, result, dresidual = None  # c.x: another call may take it away
    cdef double* sums
    cdef Job job
    if operation == BACKWARD and c.count != c.outer * c.inner:
        raise ValueError(
            f"cache: expected statistics of the {c.outer * c.inner} values per channel of x alone, "
            f"got those of {c.count:.0f}; use batch_norm_backward_reduce and _apply"
        )
    memory = take_dy(c, x, dy)
    sums = <double*>malloc((2 * c.groups * c.channels + 1) * sizeof(double))
    if sums == NULL:
        raise MemoryError(f"fastbn: no memory for the gradients of {c.channels} channels")
    try:
        job.dgamma, job.dbeta = sums, sums + c.groups * c.channels
        if operation == APPLY:
            take_values(dgamma, "dgamma", c.channels, job.dgamma, FLOAT64)
            take_values(dbeta, "dbeta", c.channels, job.dbeta, FLOAT64)
        checked_cache(c)  # once more: to make arrays of arguments may have run anything
        if out is not None:
            check_out(out, whole(c))
        result = target(out if c.valid is None else None, x, memory)
        if c.residual:
            dresidual = fresh_like(x, beside=result)
        if cnp.PyArray_SIZE(memory):
            job.dy = cnp.PyArray_DATA(memory)
            job.dresidual = NULL if dresidual is None else cnp.PyArray_DATA(dresidual)
            job.beta, job.residual = <double*>NULL, NULL
            call_kernel(
                c, BACKWARD_FIXED if c.fixed and operation == BACKWARD else operation,
                &job, x, result,
            )
        else:
            for i in range(2 * c.channels):
                sums[i] = 0
        if operation == BACKWARD:
            dgamma = gradient(job.dgamma, c.gamma_like, c)
            dbeta = gradient(job.dbeta, c.beta_like, c)
    finally:
        free(sums)
    if out is not None and may_share(out, x):
        c.x = None
    if c.valid is not None:
        dx = c.valid.put(result, out)
        dresidual = None if dresidual is None else c.valid.put(dresidual)
    else:
        dx = deliver(result, out)
    if operation == APPLY:
        return dx if dresidual is None else (dx, dresidual)
    return (dx, dgamma, dbeta) if dresidual is None else (dx, dgamma, dbeta, dresidual)
