"""What the functions are given: checked here, whole, before anything is written.

An ndarray that is as one expects, contiguous, aligned and of a common type, goes through C alone,
for a call with small arrays costs what is done here. `fastbn.checks` sees to everything else.
"""

import numpy as np

cimport numpy as cnp
from libc.math cimport isfinite

from fastbn import checks
from fastbn.functional.cache cimport Cache
from fastbn.functional.plan import plan
from fastbn.kernels.job cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Type

cnp.import_array()

cdef int bfloat16_number = -1  # NumPy's number for the type of ml_dtypes, once one was seen


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
    return OTHER


cdef cnp.ndarray as_floats(object value, str name):
    """Return value as an ndarray of a type that type_of knows, in any memory and byte order."""
    cdef cnp.ndarray array
    if type(value) is np.ndarray:
        array = value
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked array")
    else:
        array = checks.array(name, value)
    if type_of(array) == OTHER:
        if array.dtype.kind not in "biu":
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {array.dtype}"
            )
        array = array.astype(np.float64)
    return array


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
        dims = plan_of(x, axis)
        if dims is None or not is_ready(x):
            x = np.array(x, dtype=x.dtype.newbyteorder("="), order="K", copy=True)
            dims = plan_of(x, axis)
        cache.outer, cache.channels, cache.inner = dims
    cache.examples, cache.groups = cache.outer, 1
    cache.x = x
    cache.type = <Type>type_of(x)
    return True


cdef bint place_groups(Cache cache, cnp.ndarray x, object axis, object size) except -1:
    """Do as place_x, and cut the examples of the minibatch into groups of some size.

    The memory of an example must lie together: other arrays are copied. Examples are on axis 0, or
    on the last one where that is the axis of the channels.
    """
    cdef Py_ssize_t count, each
    cdef int batch = 0
    axis = checks.integer("axis", axis)
    place_x(cache, x, axis)
    x = cache.x
    if cnp.PyArray_NDIM(x) < 2:
        raise ValueError(f"x: expected an axis of examples beside that of the channels, got shape "
                         f"{np.shape(x)}")
    if axis % cnp.PyArray_NDIM(x) == 0:
        batch = cnp.PyArray_NDIM(x) - 1
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
    cache.grouped = True
    return True


cdef cnp.ndarray float64s(Py_ssize_t count, double* values):
    """Wrap values (that must outlive the array) in an ndarray."""
    cdef cnp.npy_intp size = count
    return cnp.PyArray_SimpleNewFromData(1, &size, cnp.NPY_FLOAT64, values)


cdef cnp.ndarray copy_values(
    object value, str name, Py_ssize_t channels, double* values, Type x_type
):
    """Copy a value per channel into values; return what its gradient looks like (see Cache)."""
    cdef cnp.ndarray array
    cdef Py_ssize_t c
    if type(value) is np.ndarray:
        array = value
        if cnp.PyArray_ISCARRAY_RO(array) and cnp.PyArray_SIZE(array) == channels:
            if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
                for c in range(channels):
                    values[c] = (<float*>cnp.PyArray_DATA(array))[c]
                return array
            if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
                for c in range(channels):
                    values[c] = (<double*>cnp.PyArray_DATA(array))[c]
                return array
    elif value is None:
        raise TypeError(f"{name}: expected {channels} value(s), one per channel, got None")
    array = as_floats(value, name)
    if cnp.PyArray_SIZE(array) != channels:
        raise ValueError(
            f"{name}: expected {channels} value(s), one per channel, got shape {np.shape(array)}"
        )
    cnp.PyArray_CopyAnyInto(float64s(channels, values), array)
    if isinstance(value, np.ndarray) and type_of(value) != OTHER:
        return np.empty(np.shape(array), array.dtype.newbyteorder("="))
    return np.empty(np.shape(array), np.float64 if x_type == FLOAT64 else np.float32)


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
    if not isinstance(value, np.ndarray):
        given = given.astype(x.dtype)
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
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out: expected an ndarray or None, got {type(out).__name__}")
    if np.shape(out) != np.shape(x) or cnp.PyArray_TYPE(out) != cnp.PyArray_TYPE(x):
        raise ValueError(
            f"out: expected shape {np.shape(x)} and dtype {x.dtype}, as x has, "
            f"got shape {out.shape} and dtype {out.dtype}"
        )
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out: expected a writeable array, got a read-only one")
    return True
