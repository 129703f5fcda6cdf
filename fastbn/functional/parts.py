"""Statistics in parts: of data that come in pieces, or live in several processes."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.functional import entry
from fastbn.functional.batch_norm import Activation, Array
from fastbn.functional.entry import Cache
from fastbn.functional.moments import Moments, check_moments


def batch_moments(x: ArrayLike, *, axis: int = 1) -> Moments:
    """Return mean and variance of each channel of a minibatch, or of one part of it.

    `merge_moments` puts those of several parts together, `normalize` takes them.

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

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_moments(np.array([[1.0, 10.0], [3.0, 30.0]]))
    Moments(mean=array([ 2., 20.]), var=array([  1., 100.]), count=2)
    """
    return entry.moments_of(x, axis)


def merge_moments(*moments: Moments) -> Moments:
    """Return the moments of all values together.

    By Chan's formula [1]_, with N the sum of the counts n_i::

        mean = sum n_i mean_i / N          var = sum n_i (var_i + (mean_i - mean)^2) / N

    computed as distances from one of the means, with compensated sums. The result differs from
    `batch_moments` of the whole by two roundings at most, also where the mean is a million times
    the standard deviation.

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
    return entry.merged(
        means, lows, variances, np.array([m.count for m in moments], dtype=np.float64)
    )


def packed(moments: Moments) -> NDArray[np.float64]:
    """Return moments as 3 C + 1 numbers in a row, to be sent to other processes in one message."""
    row: NDArray[np.float64] = np.concatenate(
        [moments.mean, moments.mean_low, moments.var, [moments.count]], dtype=np.float64
    )
    return row


def merge_packed(rows: NDArray[np.float64]) -> Moments:
    """Return the moments of all values together, given a packed row of each process, in order."""
    channels = rows.shape[1] // 3
    means, lows, variances = (rows[:, at * channels : (at + 1) * channels] for at in range(3))
    return entry.merged(means, lows, variances, rows[:, -1])


def normalize(
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
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
    check_moments(moments, "moments", np.size(getattr(moments, "mean", ())))
    if moments.count == 0:
        raise ValueError("moments: expected those of one value per channel at least, got count 0")
    return entry.forward(x, moments, gamma, beta, axis, eps, activation, residual, None, None, out)


def batch_norm_backward_reduce(
    dy: ArrayLike, cache: Cache
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Take the sums that the gradients of a part need, the first half of `batch_norm_backward`.

    ``dbeta_c = sum dy``, ``dgamma_c = sum dy * z_hat``; with an activation of ``dy * act'``.

    Parameters
    ----------
    dy, cache
        As in `batch_norm_backward`; the cache may be of `normalize`.

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
    return entry.backward_reduce(dy, cache)


def batch_norm_backward_apply(
    dy: ArrayLike, cache: Cache, dgamma: ArrayLike, dbeta: ArrayLike, *, out: Array | None = None
) -> Any:
    """Take the gradient from y back to x of a part, the second half of `batch_norm_backward`.

    With M the count of all parts together:
    ``dx = gamma_c * rstd_c * (dy - dbeta_c / M - z_hat * dgamma_c / M)``

    Parameters
    ----------
    dy, cache
        As in `batch_norm_backward_reduce`.
    dgamma, dbeta : array_like of C values
        The sums over all parts.
    out
        As in `batch_norm_backward`.

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
    return entry.backward_apply(dy, cache, dgamma, dbeta, out)
