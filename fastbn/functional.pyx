"""Batch normalisation as functions: check, allocate, call the kernel.

Everything that can be wrong with the arguments is found here, before anything is written. The
kernels get contiguous memory (see `_plan`) and per-channel arrays of float64.
"""

from operator import index

import numpy as np

cimport numpy as cnp
from libc.math cimport isfinite

from fastbn._dispatch import kernels
from fastbn._plan import plan

cnp.import_array()


cdef class Cache:
    """What `batch_norm_backward` needs of the forward pass.

    It holds x itself, not a copy: x must not change before the backward pass.

    Attributes
    ----------
    mean, var : ndarray of float64, shape (C,)
        The statistics of each channel; var is biased (divided by M).
    """

    cdef readonly object mean
    cdef readonly object var
    cdef object mean_low        # what rounding took from mean; None where mean was given
    cdef cnp.ndarray x          # in memory as the kernels want it; None once out= overwrote it
    cdef tuple dims             # (outer, channels, inner)
    cdef object gamma           # float64 copy, or None
    cdef tuple gamma_like       # (shape, dtype) in which the gradients are returned
    cdef tuple beta_like
    cdef double eps
    cdef bint fixed             # the statistics were given, so they are constants


cdef cnp.ndarray as_floats(object value, str name):
    """Return value as an ndarray of float32 or float64, in any memory order and byte order."""
    cdef cnp.ndarray array
    cdef int kind
    if type(value) is np.ndarray:
        array = value
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked array")
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}: expected an array_like of numbers, got {error}") from None
    kind = cnp.PyArray_TYPE(array)
    if kind != cnp.NPY_FLOAT32 and kind != cnp.NPY_FLOAT64:
        if array.dtype.kind not in "biu":
            raise TypeError(f"{name}: expected float32 or float64, got {array.dtype}")
        array = array.astype(np.float64)
    return array


cdef inline bint is_ready(cnp.ndarray array):
    """Whether the kernels can read the elements as they are."""
    return cnp.PyArray_ISALIGNED(array) and cnp.PyArray_ISNOTSWAPPED(array)


cdef tuple memory_of(cnp.ndarray x, object axis):
    """Return x, or a copy that the kernels can walk, and its (outer, channels, inner)."""
    cdef tuple shape = (<object>x).shape
    if type(axis) is not int:
        try:
            axis = index(axis)
        except TypeError:
            raise TypeError(f"axis: expected an integer, got {type(axis).__name__}") from None
    cdef object dims = plan(shape, (<object>x).strides, cnp.PyArray_ITEMSIZE(x), axis)
    if dims is None or not is_ready(x):
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="K", copy=True)
        dims = plan(shape, (<object>x).strides, cnp.PyArray_ITEMSIZE(x), axis)
    return x, dims


cdef bint same_memory_order(cnp.ndarray a, cnp.ndarray b):
    """Whether two arrays of one shape can be walked side by side, element by element."""
    cdef int i
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i):
            return False
    return True


cdef cnp.ndarray float64s(Py_ssize_t count):
    """Return an uninitialised array, sooner than np.empty does."""
    cdef cnp.npy_intp size = count
    return cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0)


cdef tuple parameter(object value, str name, Py_ssize_t channels, object dtype):
    """Return a float64 copy of shape (C,), and the shape and dtype that its gradient has."""
    if value is None:
        return None, ((channels,), dtype)
    cdef cnp.ndarray array = as_floats(value, name), copy
    if cnp.PyArray_SIZE(array) != channels:
        raise ValueError(
            f"{name}: expected {channels} value(s), one per channel, got shape {np.shape(array)}"
        )
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        dtype = array.dtype if cnp.PyArray_ISNOTSWAPPED(array) else array.dtype.newbyteorder("=")
    copy = float64s(channels)
    cnp.PyArray_CopyAnyInto(copy, array)
    return copy, ((<object>array).shape, dtype)


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


cdef check_out(object out, cnp.ndarray like, str name):
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
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")


cdef bint is_safe_target(cnp.ndarray out, cnp.ndarray source):
    """Whether elements can be written into out while source is still read.

    They can where the two are the same elements, or share none.
    """
    return (
        not np.may_share_memory(out, source)
        or cnp.PyArray_DATA(out) == cnp.PyArray_DATA(source) and same_memory_order(out, source)
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
    return np.empty_like(memory, subok=False)


cdef cnp.ndarray gradient(cnp.ndarray values, tuple like):
    """Return the gradient of a parameter in the parameter's (shape, dtype)."""
    cdef cnp.ndarray array = np.empty(*like)
    cnp.PyArray_CopyAnyInto(array, values)
    return array


cdef object deliver(cnp.ndarray result, object out):
    if out is None or result is out:
        return result
    np.copyto(out, result)
    return out


def batch_norm(x, gamma=None, beta=None, *, axis=1, eps=1e-5, out=None):
    """Normalise a minibatch by its own mean and variance, channel by channel.

    For each channel c, over the M values that it has in x::

        mean_c = (1/M) sum x          var_c = (1/M) sum (x - mean_c)^2
        y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c

    Parameters
    ----------
    x : array_like of float32 or float64, 1 or more dimensions
        The minibatch: any strides, memory order and byte order. Integers and lists are converted
        to float64.
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
    on every CPU. With M = 1, y is beta. A NaN or an infinity makes its own channel NaN, mean and
    var included, and no other.

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
    cdef cnp.ndarray given = as_floats(x, "x"), memory, result
    cdef Cache cache = Cache.__new__(Cache)
    cdef Py_ssize_t channels
    cache.eps = checked_eps(eps)
    memory, cache.dims = memory_of(given, axis)
    channels = cache.dims[1]
    if cache.dims[0] * cache.dims[2] == 0:
        raise ValueError(
            f"x: expected at least one value per channel, got shape {np.shape(given)}, axis {axis}"
        )
    cache.gamma, cache.gamma_like = parameter(gamma, "gamma", channels, memory.dtype)
    shift, cache.beta_like = parameter(beta, "beta", channels, memory.dtype)
    if out is not None:
        check_out(out, given, "x")
    result = target(out, memory, None)
    cache.mean = float64s(channels)
    cache.mean_low = float64s(channels)
    cache.var = float64s(channels)
    cache.x = memory
    if channels:
        kernels.forward(
            memory, result, *cache.dims, cache.gamma, shift, cache.eps,
            cache.mean, cache.mean_low, cache.var,
        )
    if out is not None and np.may_share_memory(out, memory):
        cache.x = None
    return deliver(result, out), cache


def inference_with_cache(x, mean, var, gamma, beta, axis, eps, out):
    """As `batch_norm_inference`; returns also the Cache for gradients at constant statistics."""
    cdef cnp.ndarray given = as_floats(x, "x"), memory, result
    cdef Cache cache = Cache.__new__(Cache)
    cdef Py_ssize_t channels
    cache.eps = checked_eps(eps)
    memory, cache.dims = memory_of(given, axis)
    channels = cache.dims[1]
    for name, value in (("mean", mean), ("var", var)):
        if value is None:
            raise TypeError(f"{name}: expected {channels} value(s), one per channel, got None")
    cache.mean = parameter(mean, "mean", channels, None)[0]
    cache.var = parameter(var, "var", channels, None)[0]
    if (cache.var < 0).any():
        raise ValueError(f"var: expected values >= 0, got {cache.var.min()}")
    cache.gamma, cache.gamma_like = parameter(gamma, "gamma", channels, memory.dtype)
    shift, cache.beta_like = parameter(beta, "beta", channels, memory.dtype)
    cache.fixed = True
    if out is not None:
        check_out(out, given, "x")
    result = target(out, memory, None)
    cache.x = memory
    if cnp.PyArray_SIZE(memory):
        kernels.inference(
            memory, result, *cache.dims, cache.gamma, shift, cache.eps, cache.mean, cache.var
        )
    if out is not None and np.may_share_memory(out, memory):
        cache.x = None
    return deliver(result, out), cache


def batch_norm_inference(x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5, out=None):
    """Normalise by given statistics, such as running averages: a scale and shift per channel.

    ``y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c``

    Parameters
    ----------
    x : array_like of float32 or float64, 1 or more dimensions
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
    return inference_with_cache(x, mean, var, gamma, beta, axis, eps, out)[0]


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
        In the shape and dtype that gamma and beta were given in; of shape (C,) and x's dtype where
        they were None or not an array of float32 or float64.

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
    cdef cnp.ndarray given, memory, result, dgamma, dbeta
    if not isinstance(cache, Cache):
        raise TypeError(
            f"cache: expected what batch_norm returned beside y, got {type(cache).__name__}"
        )
    c = cache
    if c.x is None:
        raise ValueError(
            "cache: x is needed for the gradients, but out= has overwritten it; "
            "give another array as out"
        )
    given = as_floats(dy, "dy")
    if not isinstance(dy, np.ndarray):
        given = given.astype(c.x.dtype)
    if cnp.PyArray_TYPE(given) != cnp.PyArray_TYPE(c.x):
        raise TypeError(f"dy: expected dtype {c.x.dtype}, as x has, got {given.dtype}")
    if np.shape(given) != np.shape(c.x):
        raise ValueError(f"dy: expected shape {np.shape(c.x)}, as x has, got {np.shape(given)}")
    if out is not None:
        check_out(out, c.x, "x")
    memory = given
    if not is_ready(given) or not same_memory_order(given, c.x):
        memory = np.empty_like(c.x)
        np.copyto(memory, given)
    result = target(out, c.x, memory)
    dgamma, dbeta = np.zeros(c.dims[1]), np.zeros(c.dims[1])
    if cnp.PyArray_SIZE(memory):
        kernels.backward(
            c.x, memory, result, *c.dims, c.gamma, c.eps, c.mean, c.mean_low, c.var, c.fixed,
            dgamma, dbeta,
        )
    if out is not None and np.may_share_memory(out, c.x):
        c.x = None
    return deliver(result, out), gradient(dgamma, c.gamma_like), gradient(dbeta, c.beta_like)
