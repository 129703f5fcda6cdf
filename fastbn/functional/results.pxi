# Where results go: memory of their own, or what out= names.

cdef enum:
    # Bytes. Larger results reuse memory: malloc may return such blocks to the system, and each new
    # page costs a fault.
    RECYCLED = 32 << 10


cdef cnp.ndarray fresh_like(cnp.ndarray memory, cnp.ndarray beside=None):
    """Return an uninitialised array, laid out in memory as another.

    Packs of it are aligned where those of `beside` are, so that both can be written past the cache.
    """
    cdef uintptr_t offset = 0
    if cnp.PyArray_NBYTES(memory) > RECYCLED:
        if beside is not None:
            offset = <uintptr_t>cnp.PyArray_DATA(beside) % ALIGNMENT
        return recycled(memory, offset)
    if cnp.PyArray_IS_C_CONTIGUOUS(memory) and cnp.PyArray_TYPE(memory) != cnp.NPY_VOID:
        return cnp.PyArray_EMPTY(
            cnp.PyArray_NDIM(memory), cnp.PyArray_DIMS(memory), cnp.PyArray_TYPE(memory), 0
        )
    return np.empty_like(memory, subok=False)


cdef struct Stretch:
    char* begin
    char* end


cdef Stretch stretch_of(cnp.ndarray array):
    """Return between which addresses the elements lie."""
    cdef char* begin = <char*>cnp.PyArray_DATA(array)
    cdef Stretch found = Stretch(begin, begin + cnp.PyArray_ITEMSIZE(array))
    cdef cnp.npy_intp span
    cdef int i
    for i in range(cnp.PyArray_NDIM(array)):
        span = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        found.begin += min(span, 0)
        found.end += max(span, 0)
    return found


cdef bint may_share(cnp.ndarray a, cnp.ndarray b):
    """Whether the stretches of memory that two arrays lie in overlap."""
    cdef Stretch first = stretch_of(a), second = stretch_of(b)
    if cnp.PyArray_SIZE(a) == 0 or cnp.PyArray_SIZE(b) == 0:
        return False
    return first.begin < second.end and second.begin < first.end


cdef bint is_safe_target(cnp.ndarray out, cnp.ndarray source):
    """Whether elements can be written into out while source is still read.

    They can where the two are the same elements, or share none.
    """
    return (
        cnp.PyArray_DATA(out) == cnp.PyArray_DATA(source) and same_memory_order(out, source)
        or not may_share(out, source)
    )


cdef cnp.ndarray target(Cache cache, cnp.ndarray x, object out, cnp.ndarray other):
    """Return out where the kernel can write it directly, else a fresh array laid out as x is."""
    if (
        out is not None
        and is_ready(out)
        and same_memory_order(out, x)
        and is_safe_target(out, x)
        and (other is None or is_safe_target(out, other))
    ):
        return out
    return fresh_like(x)


cdef object deliver(Cache cache, cnp.ndarray x, cnp.ndarray result, object out):
    """Return the result, in out where there is one; forget an x that it has overwritten."""
    if out is None and cache.order is not None:
        shape = np.array(np.shape(x))[cache.order]
        out = np.empty(shape, result.dtype).transpose(np.argsort(cache.order))
    if out is None:
        return result
    if may_share(out, x):
        forget_x(cache)
    if result is not out:
        np.copyto(out, result)
    return out


cdef cnp.ndarray gradient(double* values, cnp.ndarray like, Cache cache):
    """Return the gradient of a parameter, summed over the groups, in its shape and dtype."""
    cdef cnp.npy_intp size = cache.channels
    cdef cnp.ndarray array
    cdef Py_ssize_t c
    for c in range(size, cache.groups * size):
        values[c % size] += values[c]
    if like is None or cnp.PyArray_SIZE(like) != size:  # None, or resized since
        array = cnp.PyArray_EMPTY(
            1, &size, cnp.NPY_FLOAT64 if cache.type == FLOAT64 else cnp.NPY_FLOAT32, 0
        )
    else:
        array = cnp.PyArray_EMPTY(
            cnp.PyArray_NDIM(like), cnp.PyArray_DIMS(like), cnp.PyArray_TYPE(like), 0
        )
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
        for c in range(size):
            (<float*>cnp.PyArray_DATA(array))[c] = <float>values[c]
    else:
        cnp.PyArray_CopyAnyInto(array, float64s(size, values))
    return array
