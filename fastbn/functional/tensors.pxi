# Tensors of PyTorch as arrays that share their memory, in one call of C each.
#
# DLPack has a table of C functions for this, from its version 1.2 and PyTorch 2.10 on. Nothing is
# compiled against PyTorch: what stands here of the table is what the standard fixes for version 1.

cdef extern from *:
    """
    struct FastbnTensor {  // DLTensor
        void* data;
        int32_t device, device_id, ndim;
        uint8_t code, bits;
        uint16_t lanes;
        int64_t *shape, *strides;  // strides in elements
        uint64_t offset;           // in bytes
    };
    struct FastbnExchange {  // DLPackExchangeAPI
        uint32_t major, minor;
        void *older, *allocate, *from_object, *to_object;
        int (*view)(void* object, FastbnTensor* out);
    };
    """
    cdef cppclass FastbnTensor:
        void* data
        int32_t device, ndim
        uint8_t code, bits
        int64_t* shape
        int64_t* strides
        uint64_t offset
    cdef cppclass FastbnExchange:
        uint32_t major
        int (*view)(void* object, FastbnTensor* out)

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(
        PyTypeObject* kind, cnp.dtype steals, int ndim, cnp.npy_intp* shape, cnp.npy_intp* strides,
        void* data, int flags, PyObject* template,
    )

cdef enum:
    CPU = 1       # DLPack's number of the device
    INTEGER = 0   # and of kinds of types
    FLOAT = 2
    BFLOAT = 4
    DIMENSIONS = 32

cdef FastbnExchange* exchange = NULL
cdef object tensor_type = None, parameter_type = None, from_numpy = None, ways = None


def know_tensors(tensor, parameter, from_array, slow_ways):
    """Learn what a tensor is, how to make one, and the ways of what is too rare to be done here."""
    global exchange, tensor_type, parameter_type, from_numpy, ways
    tensor_type, parameter_type, from_numpy, ways = tensor, parameter, from_array, slow_ways
    capsule = getattr(tensor, "__dlpack_c_exchange_api__", None)
    if capsule is not None:
        exchange = <FastbnExchange*>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if exchange.major != 1 or exchange.view is NULL:
            exchange = NULL


cpdef cnp.ndarray array_of(tensor):
    """Return the memory of a tensor as an array, or None where the kernels cannot take it."""
    cdef FastbnTensor found
    cdef cnp.npy_intp[DIMENSIONS] shape
    cdef cnp.npy_intp[DIMENSIONS] strides
    cdef int i, number = cnp.NPY_VOID
    cdef cnp.ndarray array
    cdef cnp.dtype descr
    if type(tensor) is not tensor_type and type(tensor) is not parameter_type:
        return None
    if exchange is NULL:
        return ways.array_of(tensor)
    if exchange.view(<void*>tensor, &found):
        PyErr_Clear()
        return None
    if found.device != CPU or found.ndim > DIMENSIONS:
        return None
    if found.code == FLOAT and found.bits == 32:
        number = cnp.NPY_FLOAT32
    elif found.code == FLOAT and found.bits == 64:
        number = cnp.NPY_FLOAT64
    elif found.code == FLOAT and found.bits == 16:
        number = cnp.NPY_FLOAT16
    elif found.code != BFLOAT or found.bits != 16:
        return None
    for i in range(found.ndim):
        shape[i], strides[i] = found.shape[i], found.strides[i] * (found.bits // 8)
    descr = BFLOAT16_BITS if number == cnp.NPY_VOID else cnp.PyArray_DescrFromType(number)
    Py_INCREF(descr)
    array = PyArray_NewFromDescr(
        <PyTypeObject*>cnp.ndarray, descr, found.ndim, shape, strides,
        <char*>found.data + found.offset, cnp.NPY_ARRAY_WRITEABLE, NULL,
    )
    cnp.set_array_base(array, tensor)
    # Views of complex numbers may stand for the negative of their memory. They have gaps.
    if not cnp.PyArray_IS_C_CONTIGUOUS(array) and tensor.is_neg():
        return None
    return array


def count_up(tensor):
    """Add 1 to an integer in a tensor; return whether that could be done here."""
    cdef FastbnTensor found
    if exchange is NULL or type(tensor) is not tensor_type:
        return False
    if exchange.view(<void*>tensor, &found):
        PyErr_Clear()
        return False
    if found.device != CPU or found.code != INTEGER or found.bits != 64 or found.ndim:
        return False
    (<int64_t*>(<char*>found.data + found.offset))[0] += 1
    return True


cdef object tensor_of(cnp.ndarray array, cnp.ndarray like=None):
    """Return the memory of an array as a tensor, with the strides of `like` where they fit."""
    cdef int i
    tensor = from_numpy(array) if cnp.PyArray_TYPE(array) != cnp.NPY_VOID else ways.as_tensor(array)
    if like is not None and same_memory_order(array, like):
        for i in range(cnp.PyArray_NDIM(like)):  # an axis of one value may have any stride
            if cnp.PyArray_STRIDE(array, i) != cnp.PyArray_STRIDE(like, i):
                size = cnp.PyArray_ITEMSIZE(like)
                strides = [stride // size for stride in (<object>like).strides]
                return tensor.as_strided((<object>like).shape, strides)
    return tensor


def arrays_of(x, residual, *values):
    """Return the arrays of x, a residual and tensors of a value per channel; each may be None.

    Return None where the kernels cannot take one of them, or the types differ: those of the values
    are one type, that of x, or float32 where x has 16 bits.
    """
    cdef cnp.ndarray array = array_of(x), value
    cdef int number = -1
    if array is None or cnp.PyArray_NDIM(array) < 2:
        return None
    cdef list found = [array, None if residual is None else array_of(residual)]
    if residual is not None and found[1] is None:
        return None
    for tensor in values:
        value = None
        if tensor is not None:
            value = array_of(tensor)
            if (
                value is None or cnp.PyArray_NDIM(value) != 1
                or number not in (-1, cnp.PyArray_TYPE(value))
            ):
                return None
            number = cnp.PyArray_TYPE(value)
        found.append(value)
    if number in (-1, cnp.PyArray_TYPE(array)):
        return found
    return found if number == cnp.NPY_FLOAT32 and cnp.PyArray_ITEMSIZE(array) == 2 else None


def forward_tensors(
    x, weight, bias, mean, var, residual, bint own, bint each, eps, activation, bint graded,
    momentum=None, out=None
):
    """Normalise a tensor by its own statistics, those of `each` example, or by mean and var.

    Return y (in out, where given) and what `backward_tensors` needs: None where no gradients are
    taken, or none is required. Return None where PyTorch has to do it. With a momentum, mean and
    var move towards the statistics.
    """
    cdef cnp.ndarray array
    cdef Cache cache
    cdef Py_ssize_t least = 0
    found = arrays_of(x, residual, weight, bias, mean, var)
    if found is None or not eps > 0:
        return None
    array, addend, gamma, beta, running_mean, running_var = found
    if own:  # takes more than one value for each statistic
        least = cnp.PyArray_DIM(array, 1) * (cnp.PyArray_DIM(array, 0) if each else 1)
    if cnp.PyArray_SIZE(array) <= least:
        return None
    if cnp.PyArray_ITEMSIZE(array) == 2:
        gamma, beta = ways.wide(gamma), ways.wide(beta)
        running_mean, running_var = ways.wide(running_mean), ways.wide(running_var)
    for tensor in (x, weight, bias, residual):
        if graded and tensor is not None and tensor.requires_grad:
            break
    else:
        graded = out is not None
    group_size = 1 if own and each else None
    try:
        y, cache = forward(
            array, None if own else (running_mean, running_var), gamma, beta, 1, eps, activation,
            addend, None, group_size, out, graded,
        )
    except (TypeError, ValueError):
        return None
    if own and mean is not None and momentum is not None:
        if cache.grouped or not (
            is_running(found[4], cache.channels) and is_running(found[5], cache.channels)
        ):
            ways.update_running(cache, mean, var, momentum)
        else:
            update_running(cache, found[4], found[5], momentum)
            ways.increment_version((mean, var))
    return tensor_of(y, array), (group_size, cache.state) if graded else None


def backward_tensors(dy, x, tuple done, tuple needed, out=None):
    """Return the gradients of done, which has none, x, weight, bias and residual, where needed."""
    cdef cnp.ndarray array = array_of(x), given = array_of(dy)
    cdef Cache cache
    if given is None or not same_memory_order(given, array):
        given = ways.gradient(dy, x)
    group_size, state = done
    cache = restored(array, 1, group_size, state)
    gradients = backward(given, cache, out)
    return (
        None,
        tensor_of(gradients[0], array) if needed[1] else None,
        tensor_of(gradients[1]) if needed[2] else None,
        tensor_of(gradients[2]) if needed[3] else None,
        tensor_of(gradients[3], array) if needed[4] else None,
    )


def aligned_like(cnp.ndarray array):
    """Return an uninitialised array, in memory as another, that begins with a whole pack."""
    return recycled(array, 0)
