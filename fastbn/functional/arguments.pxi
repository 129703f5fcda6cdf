# What the functions are given: checked here, whole, before anything is written.
#
# A plain ndarray (contiguous, aligned, of a common type) is handled in C alone, because these
# checks dominate a call on a small array. What only compiled functions need (arrays like x, out=)
# stands here. `fastbn.checks` has what other rooms check as well.

cdef enum:
    OTHER = -1  # a type that kernels do not take

cdef int bfloat16_number = -1  # NumPy's number for the type of ml_dtypes, once one was seen

# What stands for bfloat16 in arrays of those who have the bits but may not have ml_dtypes.
BFLOAT16_BITS = np.dtype([("bfloat16", np.uint16)])


cdef int type_of(cnp.ndarray array):
    """Return the Type of the elements, in either byte order, or OTHER."""
    global bfloat16_number
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return FLOAT32
    if number == cnp.NPY_FLOAT64:
        return FLOAT64
    if number == cnp.NPY_FLOAT16:
        return FLOAT16
    if number == bfloat16_number or array.dtype.name == "bfloat16":
        bfloat16_number = number
        return BFLOAT16
    if number == cnp.NPY_VOID and array.dtype == BFLOAT16_BITS:
        return BFLOAT16
    return OTHER


cdef cnp.ndarray as_floats(object value, str name):
    """Return value as an ndarray of a type that type_of knows, in any memory and byte order."""
    cdef cnp.ndarray array
    if not cnp.PyArray_CheckExact(value):
        value = checks.array(name, value)
    array = value
    if type_of(array) != OTHER:
        return array
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {array.dtype}")


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


cdef tuple plan_of(cnp.ndarray x, object axis):
    return plan((<object>x).shape, (<object>x).strides, cnp.PyArray_ITEMSIZE(x), axis)


cdef bint place_x(Cache cache, cnp.ndarray x, object axis) except -1:
    """Put x, or a copy that the kernels can walk, and its dimensions into the cache."""
    cdef int channel_axis, i, ndim = cnp.PyArray_NDIM(x)
    if type(axis) is not int:
        axis = checks.integer("axis", axis)
    if is_ready(x) and cnp.PyArray_IS_C_CONTIGUOUS(x) and -ndim <= axis < ndim:
        channel_axis = axis
        channel_axis += ndim if channel_axis < 0 else 0
        cache.outer = cache.inner = 1
        for i in range(channel_axis):
            cache.outer *= cnp.PyArray_DIM(x, i)
        for i in range(channel_axis + 1, ndim):
            cache.inner *= cnp.PyArray_DIM(x, i)
        cache.channels = cnp.PyArray_DIM(x, channel_axis)
        if cache.channels == 1:
            cache.outer, cache.inner = 1, cache.outer * cache.inner
    else:
        dims = plan_of(x, axis) if is_ready(x) else None
        if dims is None:
            x = np.array(x, dtype=x.dtype.newbyteorder("="), order="K", copy=True)
            dims = plan_of(x, axis)
        cache.outer, cache.channels, cache.inner = dims
    cache.examples, cache.groups = cache.outer, 1
    cache.count = cache.own = <double>cache.outer * cache.inner
    cache.x = x
    cache.type = <Type>type_of(x)
    return True


cdef bint form_groups(Cache cache, object axis, object size) except -1:
    """Cut the examples of the minibatch, which was placed, into groups of some size.

    The memory of an example must lie together: other arrays are copied. Examples are on axis 0, or
    on the last one where that is the axis of the channels.
    """
    cdef cnp.ndarray x = cache.x
    cdef int ndim = cnp.PyArray_NDIM(x), batch = 0
    cdef Py_ssize_t count, each
    if ndim < 2:
        raise ValueError(
            f"x: expected an axis of examples beside that of the channels, got shape {np.shape(x)}"
        )
    if checks.integer("axis", axis) % ndim == 0:
        batch = ndim - 1
    count = cnp.PyArray_DIM(x, batch)
    size = checks.integer("virtual_batch_size", size)
    if size < 1:
        raise ValueError(f"virtual_batch_size: expected None or an integer >= 1, got {size}")
    each = min(size, max(count, 1))
    if count > each:
        strides = [abs(s) for s, n in zip((<object>x).strides, np.shape(x)) if n > 1]
        if (<object>x).strides[batch] != max(strides, default=0):
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, batch, 0)), 0, batch)
            place_x(cache, x, axis)
        if cache.channels == 1:
            cache.examples, cache.inner = count, cache.inner // count
        cache.outer = cache.examples // count * each
        cache.groups = (count + each - 1) // each
        cache.count = cache.own = <double>cache.outer * cache.inner
    cache.grouped = True
    return True


cdef bint place_mask(Cache cache, cnp.ndarray valid, object axis) except -1:
    """Put the runs of valid positions into the cache, after x was placed and cut into groups.

    Kernels walk positions whose channels lie together, or runs of at least a pack for each channel.
    Where x has neither it is copied, with the channels last.
    """
    cdef cnp.ndarray x = cache.x
    axis %= x.ndim
    others = by_memory(x, (i for i in range(x.ndim) if i != axis))
    if 1 < cache.inner < LANES:
        if cache.channels > 1:
            cache.order = by_memory(x, range(x.ndim))
            cache.x = laid_out(x, [*others, axis])
        cache.examples *= cache.inner
        cache.outer *= cache.inner
        cache.inner = 1
    flat = flatten(valid, others)
    find_runs(cache, flat)
    if cache.inner > 1:
        cache.valid = bits(flat)
    return True


cdef bint find_runs(Cache cache, cnp.ndarray flat) except -1:
    """Find the runs of a mask whose positions lie in the order of memory, and count them."""
    cdef const char* valid = cnp.PyArray_BYTES(flat)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(flat), begin = 0, end, limit, before = 0
    cdef Py_ssize_t row = cache.outer * cache.inner
    cdef vector[Run] runs
    cdef cnp.npy_intp[2] shape
    if cache.inner > 1 and cache.channels > 1:
        row = cache.inner
    while begin < size:
        limit = min(begin - begin % row + row, size)
        while begin < limit and not valid[begin]:
            begin += 1
        end = begin
        while end < limit and valid[end]:
            end += 1
        if end > begin:
            runs.push_back(Run(begin, before))
        before += end - begin
        begin = end
    runs.push_back(Run(size, before))
    shape[0], shape[1] = runs.size(), 2
    cache.runs = cnp.PyArray_EMPTY(2, shape, cnp.NPY_INTP, 0)
    memcpy(cnp.PyArray_DATA(cache.runs), runs.data(), runs.size() * sizeof(Run))
    cache.count = cache.own = before
    return True


cdef cnp.ndarray float64s(Py_ssize_t count, double* values):
    """Wrap values (that must outlive the array) in an ndarray."""
    cdef cnp.npy_intp size = count
    return cnp.PyArray_SimpleNewFromData(1, &size, cnp.NPY_FLOAT64, values)


cdef cnp.ndarray copy_values(Cache cache, object value, str name, double* into):
    """Copy a value per channel; return an array with the shape and dtype of its gradient."""
    cdef cnp.ndarray array
    cdef Py_ssize_t c, channels = cache.channels
    if cnp.PyArray_CheckExact(value):
        array = value
        if cnp.PyArray_ISCARRAY_RO(array) and cnp.PyArray_SIZE(array) == channels:
            if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
                for c in range(channels):
                    into[c] = (<float*>cnp.PyArray_DATA(array))[c]
                return array
            if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
                memcpy(into, cnp.PyArray_DATA(array), channels * sizeof(double))
                return array
    elif value is None:
        raise TypeError(f"{name}: expected {channels} value(s), one per channel, got None")
    array = as_floats(value, name)
    if cnp.PyArray_SIZE(array) != channels:
        raise ValueError(
            f"{name}: expected {channels} value(s), one per channel, got shape {np.shape(array)}"
        )
    cnp.PyArray_CopyAnyInto(float64s(channels, into), array)
    if cnp.PyArray_Check(value) and type_of(value) != OTHER:
        return np.empty(np.shape(array), array.dtype.newbyteorder("="))
    return np.empty(np.shape(array), np.float64 if cache.type == FLOAT64 else np.float32)


cdef cnp.ndarray copy_parameter(Cache cache, object value, str name, int which, double default):
    """Copy gamma or beta, or what stands for one that is None, into the cache."""
    cdef Py_ssize_t c
    if value is not None:
        return copy_values(cache, value, name, row_of(cache, which))
    for c in range(cache.channels):
        row_of(cache, which)[c] = default
    return None


cdef bint copy_statistics(Cache cache, object statistics) except -1:
    """Copy given statistics.

    They are (mean, var), which are constants, or Moments of more than x (or what makes these of
    the Moments of x), or those of another cache of x, in one group.
    """
    cdef Py_ssize_t c
    if type(statistics) is Cache:
        cache.count = (<Cache>statistics).count
        memcpy(
            row_of(cache, MEAN), row_of(statistics, MEAN), GAMMA * cache.channels * sizeof(double)
        )
        return True
    copy_values(cache, statistics[0], "mean", row_of(cache, MEAN))
    copy_values(cache, statistics[1], "var", row_of(cache, VAR))
    for c in range(cache.channels):
        if row_of(cache, VAR)[c] < 0:
            raise ValueError(f"var: expected values >= 0, got {cache.var.min()}")
    memset(row_of(cache, MEAN_LOW), 0, cache.channels * sizeof(double))
    if isinstance(statistics, Moments):
        cache.matrix(MEAN_LOW)[...] = statistics.mean_low
        cache.count = statistics.count
    else:
        cache.fixed = True
    return True


cdef double checked_eps(object eps) except -1:
    cdef double value
    if type(eps) is float:
        value = eps
        if isfinite(value) and value >= 0:
            return value
    return checks.eps("eps", eps)


cdef bint set_activation(Cache cache, object activation) except -1:
    cache.activated, cache.slope = activation is not None, 0
    if activation is None or type(activation) is str and activation == "relu":
        return True
    if checks.activation(activation) == "leaky_relu":
        cache.slope = 0.01
    return True


cdef cnp.ndarray check_like(object value, str name, cnp.ndarray x):
    """Return value as an array, of x's shape and dtype."""
    cdef cnp.ndarray given = as_floats(value, name)
    if not cnp.PyArray_Check(value):
        given = given.astype(x.dtype, copy=False)
    if cnp.PyArray_TYPE(given) != cnp.PyArray_TYPE(x):
        raise TypeError(f"{name}: expected dtype {x.dtype}, as x has, got {given.dtype}")
    if not cnp.PyArray_SAMESHAPE(given, x):
        raise ValueError(f"{name}: expected shape {np.shape(x)}, as x has, got {np.shape(given)}")
    return given


cdef cnp.ndarray like_x(object value, str name, cnp.ndarray x):
    """Return value as an array of x's shape and dtype, in memory as x is."""
    cdef cnp.ndarray given = check_like(value, name, x), memory
    if is_ready(given) and same_memory_order(given, x):
        return given
    memory = np.empty_like(x)
    np.copyto(memory, given)
    return memory


cdef bint check_out(object out, cnp.ndarray x) except -1:
    if not cnp.PyArray_Check(out) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out: expected an ndarray or None, got {type(out).__name__}")
    if np.shape(out) != np.shape(x) or cnp.PyArray_TYPE(out) != cnp.PyArray_TYPE(x):
        raise ValueError(
            f"out: expected shape {np.shape(x)} and dtype {x.dtype}, as x has, "
            f"got shape {out.shape} and dtype {out.dtype}"
        )
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out: expected a writeable array, got a read-only one")
    return True
