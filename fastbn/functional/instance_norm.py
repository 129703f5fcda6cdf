"""Instance normalisation: batch normalisation in groups of one example."""

from numpy.typing import ArrayLike

from fastbn.functional import entry
from fastbn.functional.batch_norm import Activation, Array
from fastbn.functional.entry import Cache


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
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
        As of `batch_norm`.
    cache : Cache
        For `instance_norm_backward`. It has `mean` and `var`: float64, shape (N, C), var biased.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Notes
    -----
    With one position and eps > 0, y is beta.

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
    return entry.forward(x, None, gamma, beta, axis, eps, activation, residual, None, 1, out)


def instance_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: Array | None = None
) -> tuple[Array, ...]:
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
    return entry.backward(dy, cache, out)
