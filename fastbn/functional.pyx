"""Batch normalisation as functions: check, allocate, call the kernel.

Everything that can be wrong with the arguments is found here, before anything is written. The
kernels get contiguous memory (see `_plan`) and per-channel values of float64.

A call with small arrays costs what is done here, so the way of an ndarray that is as one expects,
contiguous, aligned and of a common type, goes through C alone; anything else takes its time.
"""

from operator import index

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport isfinite
from libc.stdlib cimport free, malloc

from fastbn import _blocks, _dispatch
from fastbn._job cimport (
    BACKWARD,
    BACKWARD_FIXED,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FORWARD,
    INFERENCE,
    Job,
    Run,
    Type,
)
from fastbn._plan import plan

cnp.import_array()

cdef enum:
    OTHER = -1           # a type that kernels do not take
    SMALL = 1 << 15      # values: a call below is over before another thread would get the GIL
    RECYCLED = 32 << 20  # bytes: malloc gives larger blocks back, and a new one faults in each page

cdef Run run


def use_kernels(module):
    """Call the kernels of this module, one of fastbn._kernels_*, from now on."""
    global run
    run = <Run>PyCapsule_GetPointer(module.kernel, "fastbn._kernels.run")


use_kernels(_dispatch.kernels)

# The rows of a cache's statistics.
cdef enum:
    MEAN
    MEAN_LOW
    VAR
    GAMMA
    ROWS


@cython.freelist(16)
cdef class Cache:
    """What `batch_norm_backward` needs of the forward pass.

    It holds x itself, not a copy: x must not change before the backward pass.

    Attributes
    ----------
    mean, var : ndarray of float64, shape (C,)
        The statistics of each channel; var is biased (divided by M).
    """

    cdef cnp.ndarray statistics  # float64, one row each: mean, its low part, var, gamma
    cdef cnp.ndarray x           # in memory as the kernels want it; None once out= overwrote it
    cdef Type type
    cdef Py_ssize_t outer
    cdef Py_ssize_t channels
    cdef Py_ssize_t inner
    cdef double eps
    cdef bint fixed              # the statistics were given, so they are constants
    cdef cnp.ndarray gamma_like  # has the shape and dtype of the gradient; None: (C,), as x
    cdef cnp.ndarray beta_like

    @property
    def mean(self):
        return self.statistics[MEAN]

    @property
    def var(self):
        return self.statistics[VAR]

    cdef inline double* row(self, int which):
        return <double*>cnp.PyArray_DATA(self.statistics) + which * self.channels


# -------------------------------------------------------------------------------------- checking


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
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}: expected an array_like of numbers, got {error}") from None
    if type_of(array) == OTHER:
        if array.dtype.kind not in "biu":
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {array.dtype}"
            )
        array = array.astype(np.float64)
    return array


cdef inline bint is_ready(cnp.ndarray array):
    """Whether the kernels can read the elements as they are."""
    return cnp.PyArray_ISALIGNED(array) and cnp.PyArray_ISNOTSWAPPED(array)


cdef bint take_x(Cache cache, cnp.ndarray x, object axis) except -1:
    """Put x, or a copy that the kernels can walk, and its dimensions into the cache."""
    cdef int channel_axis, i, ndim = cnp.PyArray_NDIM(x)
    if type(axis) is not int:
        try:
            axis = index(axis)
        except TypeError:
            raise TypeError(f"axis: expected an integer, got {type(axis).__name__}") from None
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
        dims = plan((<object>x).shape, (<object>x).strides, cnp.PyArray_ITEMSIZE(x), axis)
        if dims is None or not is_ready(x):
            x = np.array(x, dtype=x.dtype.newbyteorder("="), order="K", copy=True)
            dims = plan((<object>x).shape, (<object>x).strides, cnp.PyArray_ITEMSIZE(x), axis)
        cache.outer, cache.channels, cache.inner = dims
    cache.x = x
    cache.type = <Type>type_of(x)
    return True


cdef bint same_memory_order(cnp.ndarray a, cnp.ndarray b):
    """Whether two arrays of one shape can be walked side by side, element by element."""
    cdef int i
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i):
            return False
    return True


cdef cnp.ndarray float64s(Py_ssize_t count, double* values):
    """Wrap values (that must outlive the array) in an ndarray."""
    cdef cnp.npy_intp size = count
    return cnp.PyArray_SimpleNewFromData(1, &size, cnp.NPY_FLOAT64, values)


cdef cnp.ndarray take_values(
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
    try:
        value = eps
    except TypeError:
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}") from None
    except OverflowError:
        raise ValueError("eps: expected a finite number >= 0, got one beyond float64") from None
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return value


cdef bint check_out(object out, cnp.ndarray like, str name) except -1:
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out: expected an ndarray or None, got {type(out).__name__}")
    if (
        np.shape(out) != np.shape(like)
        or cnp.PyArray_TYPE(out) != cnp.PyArray_TYPE(like)
    ):
        raise ValueError(
            f"out: expected shape {np.shape(like)} and dtype {like.dtype}, as {name} has, "
            f"got shape {out.shape} and dtype {out.dtype}"
        )
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out: expected a writeable array, got a read-only one")
    return True


# ------------------------------------------------------------------------------------ allocating


cdef cnp.ndarray fresh_like(cnp.ndarray memory):
    """Return an uninitialised array, laid out in memory as another."""
    if cnp.PyArray_NBYTES(memory) > RECYCLED:
        return _blocks.empty_like(memory)
    if cnp.PyArray_IS_C_CONTIGUOUS(memory):
        return cnp.PyArray_EMPTY(
            cnp.PyArray_NDIM(memory), cnp.PyArray_DIMS(memory), cnp.PyArray_TYPE(memory), 0
        )
    return np.empty_like(memory, subok=False)


cdef bint may_share(cnp.ndarray a, cnp.ndarray b):
    """Whether the stretches of memory that two arrays lie in overlap."""
    cdef char* low[2]
    cdef char* high[2]
    cdef cnp.ndarray array
    cdef cnp.npy_intp span
    cdef int i, which
    for which in range(2):
        array = a if which == 0 else b
        if cnp.PyArray_SIZE(array) == 0:
            return False
        low[which] = <char*>cnp.PyArray_DATA(array)
        high[which] = low[which] + cnp.PyArray_ITEMSIZE(array)
        for i in range(cnp.PyArray_NDIM(array)):
            span = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
            if span < 0:
                low[which] += span
            else:
                high[which] += span
    return low[0] < high[1] and low[1] < high[0]


cdef bint is_safe_target(cnp.ndarray out, cnp.ndarray source):
    """Whether elements can be written into out while source is still read.

    They can where the two are the same elements, or share none.
    """
    return (
        cnp.PyArray_DATA(out) == cnp.PyArray_DATA(source) and same_memory_order(out, source)
        or not may_share(out, source)
    )


cdef cnp.ndarray target(object out, cnp.ndarray memory, cnp.ndarray other):
    """Return out where the kernel can write it directly, else a fresh array."""
    if (
        out is not None
        and is_ready(out)
        and same_memory_order(out, memory)
        and is_safe_target(out, memory)
        and (other is None or is_safe_target(out, other))
    ):
        return out
    return fresh_like(memory)


cdef object deliver(cnp.ndarray result, object out):
    if out is None or result is out:
        return result
    np.copyto(out, result)
    return out


cdef cnp.ndarray gradient(double* values, cnp.ndarray like, Cache cache):
    """Return the gradient of a parameter in the parameter's shape and dtype."""
    cdef cnp.npy_intp size = cache.channels
    cdef cnp.ndarray array
    cdef Py_ssize_t c
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


# ----------------------------------------------------------------------------------------- calls


cdef bint call_kernel(Cache cache, cnp.ndarray x, Job* job, cnp.ndarray result) except -1:
    """Fill in what every operation needs, and run it."""
    cdef int failed
    job.type = cache.type
    job.outer, job.channels, job.inner = cache.outer, cache.channels, cache.inner
    job.x = cnp.PyArray_DATA(x)
    job.out = cnp.PyArray_DATA(result)
    job.gamma = cache.row(GAMMA)
    job.eps = cache.eps
    job.mean, job.mean_low, job.var = cache.row(MEAN), cache.row(MEAN_LOW), cache.row(VAR)
    if cnp.PyArray_SIZE(result) < SMALL:
        failed = run(job)
    else:
        with nogil:
            failed = run(job)
    if failed:
        raise MemoryError(f"fastbn: no memory for the sums of {cache.channels} channels")
    return True


cdef tuple normalize(
    object x, object mean, object var, object gamma, object beta, object axis, object eps,
    object out, bint fixed,
):
    """Do what batch_norm does, or where mean and var are given (fixed) batch_norm_inference."""
    cdef cnp.ndarray given = as_floats(x, "x"), result
    cdef Cache cache = Cache.__new__(Cache)
    cdef cnp.npy_intp shape[2]
    cdef Py_ssize_t c
    cdef double* shift
    cdef Job job
    cache.eps = checked_eps(eps)
    take_x(cache, given, axis)
    if not fixed and cache.outer * cache.inner == 0:
        raise ValueError(
            f"x: expected at least one value per channel, got shape {np.shape(given)}, axis {axis}"
        )
    shape[0], shape[1] = ROWS + 1, cache.channels  # beta needs a row only here
    cache.statistics = cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)
    if fixed:
        for name, value, which in (("mean", mean, MEAN), ("var", var, VAR)):
            if value is None:
                raise TypeError(
                    f"{name}: expected {cache.channels} value(s), one per channel, got None"
                )
            take_values(value, name, cache.channels, cache.row(which), cache.type)
        for c in range(cache.channels):
            cache.row(MEAN_LOW)[c] = 0
            if cache.row(VAR)[c] < 0:
                raise ValueError(f"var: expected values >= 0, got {cache.var.min()}")
    cache.fixed = fixed
    if gamma is None:
        for c in range(cache.channels):
            cache.row(GAMMA)[c] = 1
    else:
        cache.gamma_like = take_values(
            gamma, "gamma", cache.channels, cache.row(GAMMA), cache.type
        )
    shift = cache.row(ROWS)
    if beta is None:
        for c in range(cache.channels):
            shift[c] = 0
    else:
        cache.beta_like = take_values(beta, "beta", cache.channels, shift, cache.type)
    if out is not None:
        check_out(out, given, "x")
    result = target(out, cache.x, None)
    if cnp.PyArray_SIZE(result):
        job.operation = INFERENCE if fixed else FORWARD
        job.dy = NULL
        job.beta = shift
        call_kernel(cache, cache.x, &job, result)
    if out is not None and may_share(out, cache.x):
        cache.x = None
    return deliver(result, out), cache


def batch_norm(x, gamma=None, beta=None, *, axis=1, eps=1e-5, out=None):
    """Normalise a minibatch by its own mean and variance, channel by channel.

    For each channel c, over the M values that it has in x::

        mean_c = (1/M) sum x          var_c = (1/M) sum (x - mean_c)^2
        y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64, 1 or more dimensions
        The minibatch: any strides, memory order and byte order. Integers and lists are converted
        to float64. The 16-bit types are for storage only: all arithmetic is float32 and float64.
    gamma, beta : array_like of C values, optional
        Scale and shift of each channel, in any shape of that size. None stands for ones and zeros.
    axis : int
        The channel axis: 1 for NCHW and NC, -1 for NHWC, 0 for the course's (n_h, m).
    eps : float
        Added to the variance; at least 0.
    out : ndarray, optional
        Where y goes: of x's shape and dtype. It may be x itself (or overlap it); x is then lost,
        and `batch_norm_backward` refuses the cache.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype (in native byte order), laid out in memory as x is.
    cache : Cache
        For `batch_norm_backward`. It has `mean` and `var`: float64, shape (C,), var biased.

    Raises
    ------
    TypeError
        If an argument is not of a supported type or dtype.
    ValueError
        If a shape, `axis` or `eps` does not fit, or x has no values (M = 0).

    Notes
    -----
    In float32 errors are at most 2 eps of the largest value of the result. The bits are the same
    on every CPU. With M = 1, y is beta. A NaN or an infinity makes its own channel NaN, and no
    other; mean or var is then not finite.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
       Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]]), eps=0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> cache.mean, cache.var
    (array([ 2., 20.]), array([  1., 100.]))
    """
    return normalize(x, None, None, gamma, beta, axis, eps, out, False)


def inference_with_cache(x, mean, var, gamma, beta, axis, eps):
    """As `batch_norm_inference`; returns also the Cache for gradients at constant statistics."""
    return normalize(x, mean, var, gamma, beta, axis, eps, None, True)


def batch_norm_inference(x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5, out=None):
    """Normalise by given statistics, such as running averages: a scale and shift per channel.

    ``y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c``

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64, 1 or more dimensions
        As in `batch_norm`; may be empty.
    mean, var : array_like of C values
        The statistics of each channel, in any shape of that size; var is at least 0.
    gamma, beta : array_like of C values, optional
        Scale and shift of each channel. None stands for ones and zeros.
    axis : int
        The channel axis.
    eps : float
        Added to the variance; at least 0.
    out : ndarray, optional
        Where y goes: of x's shape and dtype. It may be x itself, or overlap it.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype (in native byte order), laid out in memory as x is.

    Raises
    ------
    TypeError
        If an argument is not of a supported type or dtype.
    ValueError
        If a shape, `axis`, `eps` or a variance does not fit.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_norm_inference(np.array([[1.0, 10.0]]), [0, 5], [1, 25], eps=0)
    array([[1., 1.]])
    """
    return normalize(x, mean, var, gamma, beta, axis, eps, out, True)[0]


def batch_norm_backward(dy, cache, *, out=None):
    """Take the gradient of a loss from y back to x, gamma and beta.

    With z_hat the normalised x and M the values per channel::

        dbeta_c = sum dy              dgamma_c = sum dy * z_hat
        dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: of its shape and dtype.
    cache : Cache
        What `batch_norm` returned. It can be used any number of times.
    out : ndarray, optional
        Where dx goes: of x's shape and dtype. It may be dy. It may overlap x as well; the cache is
        then used up.

    Returns
    -------
    dx : ndarray
        Of x's shape and dtype, laid out in memory as x is.
    dgamma, dbeta : ndarray
        In the shape and dtype that gamma and beta were given in. Where they were None, shape (C,);
        where they were None or no array of floats, x's dtype, but float32 where that has 16 bits.

    Raises
    ------
    TypeError
        If `cache` is none, or dy is of another dtype than x.
    ValueError
        If a shape does not fit, or x has been overwritten by ``out=``.

    Notes
    -----
    In float32 errors are at most 2 eps of the largest value of the result; for dx, where it is the
    small difference of large terms (dy almost a multiple of z_hat, or M = 2), 2 eps of those.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.batch_norm(np.array([[1.0], [2.0], [4.0]]))
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.ones((3, 1)), cache)
    >>> dbeta
    array([3.])
    """
    cdef Cache c
    cdef cnp.ndarray given, x, memory, result
    cdef double* sums
    cdef Job job
    if type(cache) is not Cache:
        raise TypeError(
            f"cache: expected what batch_norm returned beside y, got {type(cache).__name__}"
        )
    c = cache
    given = as_floats(dy, "dy")
    x = c.x  # ours: another call on this cache may take it away
    if x is None:
        raise ValueError(
            "cache: x is needed for the gradients, but out= has overwritten it; "
            "give another array as out"
        )
    if not isinstance(dy, np.ndarray):
        given = given.astype(x.dtype)
    if cnp.PyArray_TYPE(given) != cnp.PyArray_TYPE(x):
        raise TypeError(f"dy: expected dtype {x.dtype}, as x has, got {given.dtype}")
    if not cnp.PyArray_SAMESHAPE(given, x):
        raise ValueError(f"dy: expected shape {np.shape(x)}, as x has, got {np.shape(given)}")
    if out is not None:
        check_out(out, x, "x")
    memory = given
    if not is_ready(given) or not same_memory_order(given, x):
        memory = np.empty_like(x)
        np.copyto(memory, given)
    result = target(out, x, memory)
    sums = <double*>malloc((2 * c.channels + 1) * sizeof(double))
    if sums == NULL:
        raise MemoryError(f"fastbn: no memory for the gradients of {c.channels} channels")
    try:
        job.operation = BACKWARD_FIXED if c.fixed else BACKWARD
        job.dy = cnp.PyArray_DATA(memory)
        job.beta = NULL
        job.dgamma, job.dbeta = sums, sums + c.channels
        if cnp.PyArray_SIZE(memory):
            call_kernel(c, x, &job, result)
        else:
            for i in range(2 * c.channels):
                sums[i] = 0
        dgamma = gradient(job.dgamma, c.gamma_like, c)
        dbeta = gradient(job.dbeta, c.beta_like, c)
    finally:
        free(sums)
    if out is not None and may_share(out, x):
        c.x = None
    return deliver(result, out), dgamma, dbeta


cdef double* running(cnp.ndarray array, Py_ssize_t channels) except NULL:
    if not (
        cnp.PyArray_ISCARRAY(array)
        and cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64
        and cnp.PyArray_SIZE(array) == channels
    ):
        raise ValueError(
            f"running statistics: expected contiguous float64, {channels} value(s), "
            f"got {array.dtype}, shape {np.shape(array)}"
        )
    return <double*>cnp.PyArray_DATA(array)


def update_running(
    Cache cache not None, cnp.ndarray mean not None, cnp.ndarray var not None, double weight
):
    """Move running statistics, in place, towards those of a minibatch, var unbiased."""
    cdef Py_ssize_t c
    cdef double count = <double>cache.outer * cache.inner
    cdef double* running_mean = running(mean, cache.channels)
    cdef double* running_var = running(var, cache.channels)
    cdef double unbiased = count / (count - 1)
    for c in range(cache.channels):
        running_mean[c] = (1 - weight) * running_mean[c] + weight * cache.row(MEAN)[c]
        running_var[c] = (1 - weight) * running_var[c] + weight * (cache.row(VAR)[c] * unbiased)
