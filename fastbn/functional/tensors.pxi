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
    FLOAT = 2     # and of kinds of types
    BFLOAT = 4
    DIMENSIONS = 32

cdef FastbnExchange* exchange = NULL
cdef object tensor_type = None, parameter_type = None, slow_array_of = None


def know_tensors(tensor, parameter, slow):
    """Learn what a tensor is, and how to make an array of it where there is no table."""
    global exchange, tensor_type, parameter_type, slow_array_of
    tensor_type, parameter_type, slow_array_of = tensor, parameter, slow
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
        return slow_array_of(tensor)
    if exchange.view(<void*>tensor, &found):
        PyErr_Clear()
        return None
    if found.device != CPU or found.ndim > DIMENSIONS or tensor.is_neg():
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
    return array


def arrays_of(x, residual, *values):
    """Return the arrays of x, a residual, and tensors of a value per channel, each may be None.

    Return None where the kernels cannot take one of them, or their types differ: those of the
    values are one type, that of x, or float32 where x has 16 bits.
    """
    cdef cnp.ndarray array = array_of(x), value
    cdef int number = -1
    if array is None or cnp.PyArray_NDIM(array) < 2:
        return None
    found = [array, None]
    if residual is not None:
        found[1] = array_of(residual)
        if found[1] is None:
            return None
    for each in values:
        value = None
        if each is not None:
            value = array_of(each)
            if value is None or cnp.PyArray_NDIM(value) != 1:
                return None
            if number not in (-1, cnp.PyArray_TYPE(value)):
                return None
            number = cnp.PyArray_TYPE(value)
        found.append(value)
    if number in (-1, cnp.PyArray_TYPE(array)):
        return found
    return found if number == cnp.NPY_FLOAT32 and cnp.PyArray_ITEMSIZE(array) == 2 else None
