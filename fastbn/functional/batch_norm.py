"""Batch normalisation: by a minibatch's own statistics, by given ones, and back."""

from typing import Any, Literal, TypeAlias

from numpy.typing import ArrayLike, NDArray

from fastbn.functional import entry
from fastbn.functional.entry import Cache

Array: TypeAlias = NDArray[Any]
Activation: TypeAlias = Literal["relu", "leaky_relu"] | None


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    virtual_batch_size: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """Normalise a minibatch by its own mean and variance, channel by channel.

    For each channel c, over the M values that it has in x::

        mean_c = (1/M) sum x          var_c = (1/M) sum (x - mean_c)^2
        y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c

    and, where asked for, ``y = act(y + residual)``, in the same pass over memory.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64, 1 or more dimensions
        In any strides, memory order and byte order. Integers and lists become float64. All
        arithmetic is float32 and float64, that of the 16-bit types too.
    gamma, beta : array_like of C values, optional
        Scale and shift of each channel, in any shape of that size. None: ones and zeros.
    axis : int
        The channel axis: 1 for NCHW and NC, -1 for NHWC, 0 for the course's (n_h, m).
    eps : float
        Added to the variance; at least 0.
    activation : None, "relu" or "leaky_relu"
        act: max(a, 0), or a where a > 0 and 0.01 a elsewhere. A NaN stays.
    residual : array_like, optional
        Of x's shape and dtype: what is added before the activation.
    mask : array_like of bool, optional
        Of x's shape without `axis`: which positions count (of padded sequences, say). The
        statistics leave out the others, and y and dx are 0 there.
    virtual_batch_size : int, optional
        Normalise so many examples at a time by statistics of their own (ghost batch norm [2]_); the
        last group may be smaller. Examples are on axis 0, or on the last one where `axis` is 0.
    out : ndarray, optional
        Where y goes: of x's shape and dtype. It may overlap x, or be x: `batch_norm_backward` then
        refuses the cache, because x is lost.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype (in native byte order), laid out in memory as x is.
    cache : Cache
        For `batch_norm_backward`. It has `mean` and `var`: float64, shape (C,), var biased. With
        an activation it holds a bit for each value of y, and never y or the residual.

    Raises
    ------
    TypeError, ValueError
        If the type, dtype, shape or value of an argument does not fit, or x has no values (M = 0).

    Notes
    -----
    In float32 errors are at most 2 eps of the largest value of the result (with a residual or an
    activation: of what is added up for it), in float64 at most 4 eps. This takes deviations from
    1e-30 to 1e30 (in float64 from 1e-150 to 1e150), and a gamma / sqrt(var + eps) that is a number
    of x's type, or of float32 for 16-bit x. The bits are the same on every CPU. With M = 1 and
    eps > 0, y is beta; with eps = 0 a channel without variance divides by 0, which gives NaN. A NaN
    or an infinity makes its own channel NaN, and no other; mean or var is then not finite.

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
    return entry.forward(
        x, None, gamma, beta, axis, eps, activation, residual, mask, virtual_batch_size, out
    )


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
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
        As of `batch_norm`.

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
    return entry.forward(
        x, (mean, var), gamma, beta, axis, eps, activation, residual, None, None, out, False
    )[0]


def inference_with_cache(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    keep: bool = True,
) -> tuple[Array, Cache]:
    """Do as `batch_norm_inference`; return the cache too, to go back through if `keep`."""
    return entry.forward(
        x, (mean, var), gamma, beta, axis, eps, activation, residual, mask, None, None, keep
    )


def batch_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: Array | None = None
) -> tuple[Array, ...]:
    """Take the gradient of a loss from y back to x, gamma and beta.

    With z_hat the normalised x and M the values per channel::

        dbeta_c = sum dy              dgamma_c = sum dy * z_hat
        dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)

    With an activation, dy stands for ``dy * act'`` here: 0 (relu) or 0.01 dy (leaky_relu) where
    what went into it was 0 or below, elsewhere dy, also behind a NaN.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y: of its shape and dtype.
    cache : Cache
        What `batch_norm` returned. It can be used any number of times.
    out : ndarray, optional
        Where dx goes: of x's shape and dtype. It may be dy. If it overlaps x, the cache cannot be
        used again.

    Returns
    -------
    dx : ndarray
        Of x's shape and dtype, laid out in memory as x is.
    dgamma, dbeta : ndarray
        The shape and dtype of gamma and beta. If one was None, shape (C,). If one was no float
        array, x's dtype, or float32 for 16-bit x.
    dresidual : ndarray
        Where a residual was given: the gradient with respect to it, ``dy * act'``.

    Raises
    ------
    TypeError, ValueError
        If `cache` is not a Cache, or the dtype or shape of dy or out does not fit; if ``out=`` has
        overwritten x; if the statistics are of more than x (see `batch_norm_backward_reduce`).

    Notes
    -----
    In float32 errors are at most 2 eps of the largest value of the result; where dx is the small
    difference of large terms (dy almost a multiple of z_hat, or M = 2), 2 eps of those.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.batch_norm(np.array([[1.0], [2.0], [4.0]]))
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.ones((3, 1)), cache)
    >>> dbeta
    array([3.])
    """
    return entry.backward(dy, cache, out)
