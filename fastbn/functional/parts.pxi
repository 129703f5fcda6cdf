# Statistics in parts: of data that come in pieces, or live in several processes.


class Moments(namedtuple("Moments", ["mean", "var", "count"])):
    """Mean and variance of each channel, over some values.

    Attributes
    ----------
    mean, var : ndarray of float64, shape (C,)
        var is biased (divided by count). Of no values both are 0.
    count : int
        How many values each channel has.
    mean_low : ndarray of float64, shape (C,), or 0.0
        What mean loses in rounding, so that parts can be merged exactly where the mean is large.
        It is no item of the tuple, but goes along with copies and through pickle (not through
        ``_replace``).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> mean, var, count = fastbn.batch_moments(np.array([[1.0], [3.0]]))
    >>> mean, var, count
    (array([2.]), array([1.]), 2)
    """

    mean_low = 0.0


def batch_moments(x, *, axis=1):
    """Return mean and variance of each channel of a minibatch, or of one part of it.

    Parameters
    ----------
    x, axis
        As in `batch_norm`; x may be empty.

    Returns
    -------
    Moments
        ``mean``, ``var`` (float64, shape (C,), biased) and ``count``.

    Raises
    ------
    TypeError, ValueError
        If x is not of a supported type, or `axis` does not fit.

    See Also
    --------
    merge_moments : puts those of several parts together.
    normalize : takes them to normalise any part.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_moments(np.array([[1.0, 10.0], [3.0, 30.0]]))
    Moments(mean=array([ 2., 20.]), var=array([  1., 100.]), count=2)
    """
    cdef Cache cache = Cache.__new__(Cache)
    cdef cnp.npy_intp shape[2]
    cdef Job job
    take_x(cache, as_floats(x, "x"), axis)
    cache.count = <double>cache.outer * cache.inner
    shape[0], shape[1] = BETA, cache.channels
    cache.statistics = cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    if cnp.PyArray_SIZE(cache.x):
        job.dy = job.residual = job.dresidual = NULL
        job.beta = NULL
        call_kernel(cache, FORWARD, &job, cache.x, None)
    return cache.moments


def merge_moments(*moments):
    """Return the moments of all values together.

    By Chan's formula [1]_, with N the sum of the counts n_i::

        mean = sum n_i mean_i / N          var = sum n_i (var_i + (mean_i - mean)^2) / N

    computed as distances from one of the means, with compensated sums: within a rounding or two of
    `batch_moments` of the whole, also where the mean is a million times the standard deviation.

    Parameters
    ----------
    *moments : Moments
        One or more, of the same channels; those without values (count 0) add nothing.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError, ValueError
        If one is no `Moments` or does not fit, or none is given.

    References
    ----------
    .. [1] Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> a, b = fastbn.batch_moments(np.array([[1.0]])), fastbn.batch_moments(np.array([[3.0]]))
    >>> fastbn.merge_moments(a, b)
    Moments(mean=array([2.]), var=array([1.]), count=2)
    """
    if not moments:
        raise ValueError("moments: expected one or more, got none")
    size = np.size(moments[0][0]) if isinstance(moments[0], Moments) else 0
    for i, each in enumerate(moments):
        check_moments(each, f"moments[{i}]", size)
    means, lows, variances = (
        np.array([np.broadcast_to(np.ravel(getattr(m, field)), size) for m in moments], np.float64)
        for field in ("mean", "mean_low", "var")
    )
    return pooled(means, lows, variances, np.array([m.count for m in moments], dtype=np.float64))


cdef bint check_moments(object moments, str name, Py_ssize_t channels) except -1:
    if not isinstance(moments, Moments):
        raise TypeError(f"{name}: expected Moments, got {type(moments).__name__}")
    for field in ("mean", "var", "count"):
        value = np.asarray(getattr(moments, field))
        size = 1 if field == "count" else channels
        if value.dtype.kind not in "fiu" or value.size != size or value.ndim > (field != "count"):
            raise ValueError(
                f"{name}.{field}: expected {size} number(s), got {value.dtype} of shape "
                f"{value.shape}"
            )
        if field != "mean" and (value < 0).any():
            raise ValueError(f"{name}.{field}: expected values >= 0, got {value.min()}")
    if moments.count % 1:
        raise ValueError(f"{name}.count: expected an integer, got {moments.count}")
    return True


cdef struct Sum:
    double high
    double low  # what rounding has taken from high so far


cdef inline Sum plus(Sum a, double b) noexcept nogil:
    cdef double high = a.high + b, part = high - a.high
    a.low += (a.high - (high - part)) + (b - part)
    a.high = high
    return a


cdef object pooled(object means, object lows, object variances, object counts):
    """Return the Moments of all, given those of k parts: float64, shape (k, C); counts (k,)."""
    cdef double[:, :] mean = np.atleast_2d(means), low = np.atleast_2d(lows)
    cdef double[:, :] var = np.atleast_2d(variances)
    cdef double[:] n = counts
    cdef Py_ssize_t parts = mean.shape[0], channels = mean.shape[1], c, i, first = 0
    cdef cnp.ndarray result = np.zeros((3, channels))
    cdef double[:, :] into = result
    cdef double total = np.sum(counts), origin, d
    cdef Sum distance, m2
    while first < parts - 1 and n[first] == 0:
        first += 1
    for c in range(channels if total else 0):
        origin = mean[first, c]
        distance = m2 = Sum(0, 0)
        for i in range(first, parts):
            if n[i]:
                distance = plus(distance, n[i] * ((mean[i, c] - origin) + low[i, c]))
        d = (distance.high + distance.low) / total
        for i in range(first, parts):
            if n[i]:
                m2 = plus(m2, n[i] * (var[i, c] + (((mean[i, c] - origin) + low[i, c]) - d) ** 2))
        distance = plus(Sum(origin, 0), d)
        into[0, c], into[1, c] = distance.high, distance.low
        into[2, c] = (m2.high + m2.low) / total
    moments = Moments(result[0], result[2], int(total))
    moments.mean_low = result[1]
    return moments


def normalize(
    x, moments, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None,
    out=None,
):
    """Normalise a part of a minibatch by the moments of all of it.

    ``batch_norm(x)`` in parts: `batch_moments` of each, `merge_moments` of all, then this for each
    part; y is what `batch_norm` would give to the whole, within the same errors. To go back, each
    part calls `batch_norm_backward_reduce`, the results are added up, and
    `batch_norm_backward_apply` gives each part its dx.

    Parameters
    ----------
    x, gamma, beta, axis, eps, activation, residual, out
        As in `batch_norm`; x may be empty.
    moments : Moments
        Of one value per channel at least.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype.
    cache : Cache
        For the two halves of the backward pass.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, or if `moments` has no values or does not fit.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> parts = np.array([[1.0]]), np.array([[3.0]])
    >>> moments = fastbn.merge_moments(*map(fastbn.batch_moments, parts))
    >>> [fastbn.normalize(x, moments, eps=0)[0].item() for x in parts]
    [-1.0, 1.0]
    """
    cdef Cache cache
    check_moments(moments, "moments", np.size(getattr(moments, "mean", ())))
    if moments.count == 0:
        raise ValueError("moments: expected those of one value per channel at least, got count 0")
    given = moments.mean, moments.mean_low, moments.var
    count = float(moments.count)
    y, cache = forward(x, given, gamma, beta, axis, eps, activation, residual, None, out)
    cache.fixed, cache.count = False, count
    return y, cache


def batch_norm_backward_reduce(dy, cache):
    """Take the sums that the gradients of a part need, the first half of `batch_norm_backward`.

    ``dbeta_c = sum dy``, ``dgamma_c = sum dy * z_hat`` (dy behind an activation counted as that
    lets it through).

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: of its shape and dtype.
    cache : Cache
        What `normalize` or `batch_norm` returned.

    Returns
    -------
    dgamma, dbeta : ndarray of float64, shape (C,)
        To be added to those of the other parts.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`; also if groups of examples have statistics of their own.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [4.0]])
    >>> y, cache = fastbn.batch_norm(x)
    >>> dgamma, dbeta = fastbn.batch_norm_backward_reduce(np.ones((3, 1)), cache)
    >>> dbeta
    array([3.])
    """
    cdef Cache c = checked_cache(cache, True)
    cdef cnp.ndarray x = c.x, memory = take_dy(c, x, dy), sums = np.zeros((2, c.channels))
    cdef Job job
    checked_cache(c)  # once more: to make an array of dy may have run anything
    if cnp.PyArray_SIZE(memory):
        job.dy = cnp.PyArray_DATA(memory)
        job.residual = job.dresidual = NULL
        job.beta = NULL
        job.dgamma = <double*>cnp.PyArray_DATA(sums)
        job.dbeta = job.dgamma + c.channels
        call_kernel(c, BACKWARD, &job, x, None)
    return sums[0], sums[1]


def batch_norm_backward_apply(dy, cache, dgamma, dbeta, *, out=None):
    """Take the gradient from y back to x of a part, the second half of `batch_norm_backward`.

    With M the count of all parts together:
    ``dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)``

    Parameters
    ----------
    dy, cache
        As in `batch_norm_backward_reduce`.
    dgamma, dbeta : array_like of C values
        The sums over all parts.
    out : ndarray, optional
        Where dx goes, as in `batch_norm_backward`.

    Returns
    -------
    dx : ndarray
        Of x's shape and dtype; where there was a residual, ``(dx, dresidual)``.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward_reduce`, or if dgamma or dbeta does not fit.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> y, cache = fastbn.batch_norm(x)
    >>> sums = fastbn.batch_norm_backward_reduce(dy, cache)
    >>> dx = fastbn.batch_norm_backward_apply(dy, cache, *sums)
    >>> bool((dx == fastbn.batch_norm_backward(dy, cache)[0]).all())
    True
    """
    return backward(dy, cache, out, dgamma, dbeta, APPLY)
