"""Batch normalisation as functions: check, allocate, call the kernel.

What is wrong with the arguments is found, mostly in `arguments.pxi`, before anything is written.
The kernels get contiguous memory (see `plan`) and per-channel values of float64.

A call with small arrays costs what is done here, so the way of an ndarray that is as one expects,
contiguous, aligned and of a common type, goes through C alone; anything else takes its time.
"""

from collections import namedtuple
from operator import index

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport isfinite
from libc.stdint cimport uint16_t, uintptr_t
from libc.stdlib cimport free, malloc

from fastbn.kernels import variants
from fastbn.kernels.job cimport (
    APPLY,
    BACKWARD,
    BACKWARD_FIXED,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FORWARD,
    INFERENCE,
    Job,
    KernelFunction,
    Operation,
    Type,
)
from fastbn.functional.mask import Valid
from fastbn.functional.plan import plan
from fastbn.runtime import memory as memory_of_results

cnp.import_array()

cdef enum:
    OTHER = -1           # a type that kernels do not take
    SMALL = 1 << 15      # values: a call below is over before another thread would get the GIL
    RECYCLED = 2 << 20   # bytes: malloc may give larger blocks back, and new pages fault
    LANES = 16           # values in a pack, and signs in a word

cdef KernelFunction run


def use_kernels(module):
    """Call the kernels of this module, one of fastbn.kernels.*, from now on."""
    global run
    run = <KernelFunction>PyCapsule_GetPointer(module.kernel, "fastbn.kernels.compute")


use_kernels(variants.kernels)

# The rows of a cache's statistics; those before GAMMA have one for each group.
cdef enum:
    MEAN
    MEAN_LOW
    VAR
    GAMMA
    BETA  # only while y is computed


@cython.freelist(16)
cdef class Cache:
    """What `batch_norm_backward` needs of the forward pass.

    It holds x itself, not a copy: x must not change before the backward pass.

    Attributes
    ----------
    mean, var : ndarray of float64, shape (C,)
        The statistics of each channel; var is biased (divided by M). Where each group of examples
        has its own, as in `instance_norm`: shape (groups, C).
    moments : Moments
        The statistics of the whole minibatch, all groups together.
    """

    cdef cnp.ndarray statistics  # float64: means, their low parts, vars, gamma
    cdef cnp.ndarray x           # in memory as the kernels want it; None once out= overwrote it
    cdef Type type
    cdef Py_ssize_t examples
    cdef Py_ssize_t outer        # of these in a group
    cdef Py_ssize_t channels
    cdef Py_ssize_t inner
    cdef double count            # values of a channel that the statistics are of
    cdef double eps
    cdef Py_ssize_t groups
    cdef bint grouped
    cdef bint fixed              # the statistics were given, so they are constants
    cdef bint residual           # there was one
    cdef bint activated
    cdef double slope            # of the activation below 0
    cdef cnp.ndarray signs       # a bit for each value: whether it was above 0 there (see Job)
    cdef Py_ssize_t first_bit
    cdef object valid            # the positions of x that a mask has left (see mask)
    cdef cnp.ndarray gamma_like  # has the shape and dtype of the gradient; None: (C,), as x
    cdef cnp.ndarray beta_like

    @property
    def mean(self):
        return self.matrix(MEAN)

    @property
    def var(self):
        return self.matrix(VAR)

    @property
    def moments(self):
        return pooled(self.matrix(MEAN), self.matrix(MEAN_LOW), self.matrix(VAR), self.counts())

    cdef inline double* row(self, int which):
        return <double*>cnp.PyArray_DATA(self.statistics) + (
            which * self.groups if which < GAMMA else GAMMA * self.groups + which - GAMMA
        ) * self.channels

    cdef matrix(self, int which):
        rows = self.statistics[which * self.groups:(which + 1) * self.groups]
        return rows if self.grouped else rows[0]

    cdef counts(self):
        """Return how many values of a channel each group has."""
        counts = np.full(self.groups, self.count)
        if self.grouped:
            counts[:] = self.outer * self.inner
            counts[self.groups - 1] = (self.examples - (self.groups - 1) * self.outer) * self.inner
        return counts


include "arguments.pxi"
include "outputs.pxi"
include "to_kernel.pxi"


def batch_norm(
    x, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None, mask=None,
    virtual_batch_size=None, out=None,
):
    """Normalise a minibatch by its own mean and variance, channel by channel.

    For each channel c, over the M values that it has in x::

        mean_c = (1/M) sum x          var_c = (1/M) sum (x - mean_c)^2
        y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c

    and, where asked for, ``y = act(y + residual)``, in the same pass over memory.

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
    activation : None, "relu" or "leaky_relu"
        act: max(a, 0), or a where a > 0 and 0.01 a elsewhere. A NaN stays.
    residual : array_like, optional
        Of x's shape and dtype: what is added before the activation.
    mask : array_like of bool, optional
        Of x's shape without `axis`: which positions count (of padded sequences, say). The others
        are not part of the statistics, and y and dx are 0 there.
    virtual_batch_size : int, optional
        Normalise so many examples at a time, each group by statistics of its own (ghost batch
        norm [2]_); the last group may be smaller. Examples are on axis 0, or on the last one where
        `axis` is 0.
    out : ndarray, optional
        Where y goes: of x's shape and dtype. It may be x itself (or overlap it); x is then lost,
        and `batch_norm_backward` refuses the cache.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype (in native byte order), laid out in memory as x is.
    cache : Cache
        For `batch_norm_backward`. It has `mean` and `var`: float64, shape (C,), var biased. With
        an activation it holds a bit for each value of y, and never y or the residual.

    Raises
    ------
    TypeError
        If an argument is not of a supported type or dtype.
    ValueError
        If a shape, `axis`, `eps`, `activation`, `mask` or `virtual_batch_size` does not fit, or x
        has no values (M = 0).

    Notes
    -----
    In float32 errors are at most 2 eps of the largest value of the result (of what is added up for
    it, where there is a residual or an activation, which may leave only small ones). The bits are
    the same on every CPU. With M = 1, y is beta. A NaN or an infinity makes its own channel NaN,
    and no other; mean or var is then not finite.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
       Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better: closing the
       generalization gap in large batch training of neural networks", NIPS 2017,
       https://arxiv.org/abs/1705.08741

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
    if mask is None:
        return forward(
            x, None, gamma, beta, axis, eps, activation, residual, virtual_batch_size, out
        )
    if virtual_batch_size is not None:
        raise ValueError(
            f"virtual_batch_size: expected None where there is a mask, got {virtual_batch_size}"
        )
    return masked_forward(x, None, gamma, beta, axis, eps, activation, residual, mask, out)


def instance_norm(
    x, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None, out=None
):
    """Normalise each channel of each example by its own mean and variance.

    For each example n and channel c, over the positions that it has::

        y = gamma_c * (x - mean_nc) / sqrt(var_nc + eps) + beta_c

    and, where asked for, ``y = act(y + residual)``: `batch_norm` in groups of one example.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64, 2 or more dimensions
        Examples on axis 0 (or on the last one where `axis` is 0); otherwise as in `batch_norm`.
    gamma, beta, axis, eps, activation, residual, out
        As in `batch_norm`.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype.
    cache : Cache
        For `instance_norm_backward`. It has `mean` and `var`: float64, shape (N, C), var biased.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Notes
    -----
    With one position, y is beta.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient
       for Fast Stylization", 2016, https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.instance_norm(np.array([[[1.0, 3.0]], [[10.0, 30.0]]]), eps=0)
    >>> y
    array([[[-1.,  1.]],
    <BLANKLINE>
           [[-1.,  1.]]])
    """
    return forward(x, None, gamma, beta, axis, eps, activation, residual, 1, out)


def inference_with_cache(
    x, mean, var, gamma, beta, axis, eps, activation=None, residual=None, mask=None
):
    """As `batch_norm_inference`; returns also the Cache for gradients at constant statistics."""
    given = mean, 0.0, var
    if mask is not None:
        return masked_forward(x, given, gamma, beta, axis, eps, activation, residual, mask, None)
    return forward(x, given, gamma, beta, axis, eps, activation, residual, None, None)


def batch_norm_inference(
    x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None,
    out=None,
):
    """Normalise by given statistics, such as running averages: a scale and shift per channel.

    ``y = act(gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c + residual)``

    Parameters
    ----------
    x, gamma, beta, axis, eps, activation, residual
        As in `batch_norm`; x may be empty.
    mean, var : array_like of C values
        The statistics of each channel, in any shape of that size; var is at least 0.
    out : ndarray, optional
        Where y goes: of x's shape and dtype. It may be x itself, or overlap it.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype (in native byte order), laid out in memory as x is.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, or if a variance is below 0.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_norm_inference(np.array([[1.0, 10.0]]), [0, 5], [1, 25], eps=0)
    array([[1., 1.]])
    """
    given = mean, 0.0, var
    return forward(x, given, gamma, beta, axis, eps, activation, residual, None, out, False)[0]


def batch_norm_backward(dy, cache, *, out=None):
    """Take the gradient of a loss from y back to x, gamma and beta.

    With z_hat the normalised x and M the values per channel::

        dbeta_c = sum dy              dgamma_c = sum dy * z_hat
        dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)

    With an activation, dy stands for ``dy * act'`` here: dy where what went into it was above 0,
    elsewhere 0 (relu) or 0.01 dy (leaky_relu).

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
    dresidual : ndarray
        Only where a residual was given: the gradient with respect to it, ``dy * act'``.

    Raises
    ------
    TypeError
        If `cache` is none, or dy is of another dtype than x.
    ValueError
        If a shape does not fit, x has been overwritten by ``out=``, or the statistics are those of
        more than x (see `batch_norm_backward_reduce`).

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
    return backward(dy, cache, out, None, None, BACKWARD)


def instance_norm_backward(dy, cache, *, out=None):
    """Take the gradient of a loss from y of `instance_norm` back to x, gamma and beta.

    The same as `batch_norm_backward`, each example with its own mean, rstd and M = its positions::

        dbeta_c = sum dy              dgamma_c = sum dy * z_hat     (over all examples)
        dx = gamma_c * rstd_nc * (dy - mean_nc(dy) - z_hat * mean_nc(dy * z_hat))

    Parameters, results and errors are those of `batch_norm_backward`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.instance_norm(np.array([[[1.0, 2.0, 4.0]]]))
    >>> dx, dgamma, dbeta = fastbn.instance_norm_backward(np.ones((1, 1, 3)), cache)
    >>> dbeta
    array([3.])
    """
    return backward(dy, cache, out, None, None, BACKWARD)


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
    cdef double count = cache.count
    cdef double* running_mean = running(mean, cache.channels)
    cdef double* running_var = running(var, cache.channels)
    cdef double* batch_mean = cache.row(MEAN)
    cdef double* batch_var = cache.row(VAR)
    cdef double unbiased
    if cache.groups > 1:
        moments = cache.moments
        count = moments.count
        batch_mean = running(moments.mean, cache.channels)
        batch_var = running(moments.var, cache.channels)
    unbiased = count / (count - 1)
    for c in range(cache.channels):
        running_mean[c] = (1 - weight) * running_mean[c] + weight * batch_mean[c]
        running_var[c] = (1 - weight) * running_var[c] + weight * (batch_var[c] * unbiased)


include "parts.pxi"
