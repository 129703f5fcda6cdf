"""Instance normalisation as a layer."""

from __future__ import annotations

from numpy.typing import ArrayLike

from fastbn.functional import entry
from fastbn.layers.base import Array, Norm


class InstanceNorm(Norm):
    """Instance normalisation: each channel of each example by its own mean and variance.

    Over the positions (of an image, a sequence) that an example n has in a channel c::

        y = gamma_c * (x - mean_nc) / sqrt(var_nc + eps) + beta_c

    (then, where asked for, ``y = act(y + residual)``), in training and, unless there are running
    statistics, in evaluation too. The defaults are those of PyTorch: neither parameters nor running
    statistics. Examples are on axis 0 (on the last one where `axis` is 0).

    Parameters
    ----------
    num_features, axis, eps, momentum, affine, dtype, activation
        As in `BatchNorm`.
    track_running_stats : bool
        Whether the layer keeps running statistics and uses them in evaluation: those of mean and
        (unbiased) var, averaged over the examples.

    Attributes
    ----------
    params, grads, running_mean, running_var, num_batches_tracked, training, frozen, frozen_params
        As in `BatchNorm`, and so are the arguments.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient
       for Fast Stylization", 2016, https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> norm = fastbn.InstanceNorm(1, eps=0)
    >>> norm(np.array([[[1.0, 3.0]], [[10.0, 30.0]]])).ravel()
    array([-1.,  1., -1.,  1.])
    """

    def forward(self, x: ArrayLike, residual: ArrayLike | None = None) -> Array:
        """Normalise x, and in training update the running statistics, if there are any.

        As in `BatchNorm.forward`, without mask. Each example needs more than one position when
        statistics are taken.
        """
        x = self._with_channels(x)
        constants = self._constants()
        if constants is not None:
            return self._forward_by_constants(x, constants, residual)
        mean, var = self.running_mean, self.running_var
        if x.ndim < 2 or x.size < 2 * self.num_features * max(1, self._examples(x)):
            words = "more than one position per example and channel to take statistics of"
            raise ValueError(f"x: expected {words}, got shape {x.shape}")
        keep = self.training or self._keeps
        y, cache = entry.forward(
            x, None, self.params.get("gamma"), self.params.get("beta"), self.axis, self.eps,
            self.activation, residual, None, 1, None, keep,
        )  # fmt: skip
        if self.training and self._seen is None and mean is not None and var is not None:
            self._writeable("running_mean", "running_var")
            weight, count = self._weight(), cache.moments.count / len(cache.mean)
            unbiased = cache.var.mean(axis=0) * (count / (count - 1))
            mean[...], var[...] = (
                (1 - weight) * mean + weight * cache.mean.mean(axis=0),
                (1 - weight) * var + weight * unbiased,
            )
            self.num_batches_tracked += 1
        self._pass = (cache, None, None) if keep else None
        return y
