"""Batch normalisation as a layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import checks, functional
from fastbn.functional import entry
from fastbn.functional.parts import merge_packed, packed
from fastbn.layers import conversions
from fastbn.layers.base import Array, Norm, checked_or_none
from fastbn.layers.collective import Communicator, Gather, exchange

if TYPE_CHECKING:
    from fastbn.functional import Activation, Cache, Moments


LIMITS = checks.Rule(
    "None or two numbers, r_max >= 1 and d_max >= 0", tuple,
    lambda x: len(x) == 2 and {*map(type, x)} <= {int, float} and x[0] >= 1 and x[1] >= 0,
)  # fmt: skip


class BatchNorm(Norm):
    """Batch normalisation with trainable scale and shift, and running statistics for inference.

    In training each channel is normalised by the minibatch, over the M values it has there::

        y = gamma * (x - mean) / sqrt(var + eps) + beta

    (then, where asked for, ``y = act(y + residual)`` in the same pass over memory), and the running
    statistics move towards the minibatch's, var made unbiased first::

        running = (1 - momentum) * running + momentum * new

    In evaluation (after `eval()`) the running statistics take the place of mean and var. The layer
    belongs between a linear map without bias and the activation.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int
        The channel axis: 1 for NCHW and NC, -1 for NHWC, 0 for the course's (n_h, m).
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of the new value in the running statistics (as in PyTorch; Keras calls
        1 - momentum so). None: the average of all minibatches so far.
    affine, track_running_stats : bool
        Whether the layer has gamma and beta, and whether it keeps running statistics. Without
        running statistics evaluation uses the minibatch.
    dtype : dtype
        Of gamma and beta and their gradients: float32 or float64.
    activation : None, "relu" or "leaky_relu"
        What follows, as in `batch_norm`.
    virtual_batch_size : int or None
        In training, normalise so many examples at a time (ghost batch norm), as in `batch_norm`.
        The running statistics are those of the whole minibatch all the same.
    renorm : None or (r_max, d_max)
        Batch renormalisation [2]_, for small minibatches. Training takes
        ``y = gamma * (r * (x - mean) / sqrt(var + eps) + d) + beta`` with the constants::

            r = clip(sqrt(var + eps) / sqrt(running_var + eps), 1 / r_max, r_max)
            d = clip((mean - running_mean) / sqrt(running_var + eps), -d_max, d_max)

        Within the limits y is what evaluation gives. (1, 0) is batch norm; the paper starts with
        it, and widens the limits to (3, 5) while it trains. The running statistics, which start at
        0 and 1, need that time.
    comm : communicator or None
        Of mpi4py, or any object with `rank`, `size` and ``Allgather(send, recv)``. The minibatch is
        then that of all its ranks: in training each sends the moments of its part to all others,
        and in backward its sums, and all merge them in the order of ranks, to the same bits. Parts
        may be uneven or empty. See Notes. A copy of the layer has None.

    Attributes
    ----------
    num_features, axis, eps, momentum, dtype, activation, virtual_batch_size, renorm, comm
        The arguments. They are checked when they are set, too.
    params, grads : dict of str to ndarray
        The parameters "gamma" and "beta", shape (C,), and their gradients, under the same keys;
        empty if not affine. Optimizers change the arrays in place.
    running_mean, running_var : ndarray of float64, shape (C,), or None
        The running statistics, 0 and 1 at first; var is unbiased.
    num_batches_tracked : int
        How many minibatches the running statistics have seen.
    training : bool
        Which of the two modes the layer is in.
    frozen, frozen_params : bool, tuple of str
        Whether `freeze` keeps the running statistics, and which parameters.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    With `comm` all ranks call `forward` in training, and then `backward`, of the same layers in the
    same order; dy is the gradient of one loss, the same for all ranks. dgamma and dbeta are
    those of this rank's part alone: their sum over the ranks is the gradient, as with the
    parameters of any layer. What a rank cannot do (a wrong shape, say) raises on all ranks, and
    names the rank.

    Different layers can be used from different threads; one layer is for one thread at a time.
    A copy (`copy.deepcopy`, pickle) has the state but neither the hooks nor the minibatch that
    `backward` would go back through.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
       Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
       Batch-Normalized Models", NIPS 2017, https://arxiv.org/abs/1702.03275

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> bn(np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)).round(3).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> bn.running_mean
    array([0.2, 2. ])
    """

    virtual_batch_size: int | None = checked_or_none(partial(checks.integer, least=1))
    renorm: tuple[float, float] | None = checked_or_none(
        partial(checks.hyper_parameter, rule=LIMITS)
    )
    comm: Communicator | None = checked_or_none(checks.communicator)

    def __init__(
        self, num_features: int, *, axis: int = 1, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, dtype: DTypeLike = np.float32,
        activation: Activation = None, virtual_batch_size: int | None = None,
        renorm: tuple[float, float] | None = None, comm: Communicator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, axis=axis, eps=eps, momentum=momentum, affine=affine,
            track_running_stats=track_running_stats, dtype=dtype, activation=activation,
        )  # fmt: skip
        self.virtual_batch_size, self.renorm, self.comm = virtual_batch_size, renorm, comm
        self._check_renorm()
        self._check_comm()

    fold_into = conversions.fold_into
    from_keras = classmethod(conversions.from_keras)
    from_onnx = classmethod(conversions.from_onnx)

    def forward(
        self, x: ArrayLike, residual: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> Array:
        """Normalise x, and in training update the running statistics.

        Parameters
        ----------
        x : array_like of float16, bfloat16, float32 or float64
            With `num_features` channels on `axis`. It must not change before `backward`.
        residual : array_like, optional
            Of x's shape and dtype: what is added before the activation.
        mask : array_like of bool, optional
            Of x's shape without `axis`: which positions count. The others are not part of the
            statistics, and y and dx are 0 there.

        Returns
        -------
        ndarray
            y, of x's shape and dtype.

        Raises
        ------
        TypeError
            If x, residual or mask is of another type.
        ValueError
            If x has another number of channels, or in training one value per channel or none (in
            a group of `virtual_batch_size` examples, or left by the mask), or if residual or mask
            is of another shape, or if `renorm` is set beside `virtual_batch_size`, or without
            running statistics.
        """
        if self.comm is None or not self.training or self.frozen:
            return self._forward(x, residual, mask)
        with exchange(self.comm, 3 * self.num_features + 1) as gather:
            self._check_comm()
            return self._forward(x, residual, mask, gather)

    def _forward(
        self, x: ArrayLike, residual: ArrayLike | None, mask: ArrayLike | None,
        gather: Gather | None = None,
    ) -> Array:  # fmt: skip
        """Do as `forward`; with `gather` the minibatch is that of all ranks."""
        x = self._with_channels(x)
        constants = self._constants()
        if constants is not None:
            return self._forward_by_constants(x, constants, residual, mask)
        gamma, beta = self.params.get("gamma"), self.params.get("beta")
        mean, var = self.running_mean, self.running_var
        group = self.virtual_batch_size if self.training else None
        statistics: Any = None  # the minibatch's own
        if gather is not None:
            statistics = partial(self._merged, gather)
        else:
            self._refuse_too_few(x, mask, group)
        correction = None
        if self.renorm is not None:
            self._check_renorm()
        if self.training and self.renorm is not None and mean is not None and var is not None:
            _, statistics = entry.forward(
                x, statistics, None, None, self.axis, self.eps, None, residual, mask, None, None,
                False,
            )  # fmt: skip
            correction = r, d = self._correction(statistics, mean, var, *self.renorm)
            scale: Any = 1.0 if gamma is None else gamma
            gamma, beta = scale * r, scale * d + (0.0 if beta is None else beta)
        keep = self.training or self._keeps
        y, cache = entry.forward(
            x, statistics, gamma, beta, self.axis, self.eps, self.activation, residual, mask,
            group, None, keep,
        )  # fmt: skip
        if self.training and self._seen is not None:
            if gather is None:
                self._seen.append(cache.moments)
        elif self.training and mean is not None and var is not None:
            functional.update_running(cache, mean, var, self._weight())
            self.num_batches_tracked += 1
        comm = None if gather is None else self.comm
        self._pass = (cache, correction, comm) if keep else None
        return y

    def _merged(self, gather: Gather, own: Moments) -> Moments:
        """Return the moments of all ranks, merged in their order; all get the same bits."""
        if self._seen is not None:
            self._seen.append(own)
        moments = merge_packed(gather(packed(own)))
        if moments.count < 2:
            words = "more than one value per channel on all ranks together"
            raise ValueError(f"x: expected {words}, got {moments.count}")
        return moments

    def _check_comm(self) -> None:
        """Refuse a communicator together with what it cannot go with."""
        size = self.virtual_batch_size
        if self.comm is not None and size is not None:
            raise ValueError(f"virtual_batch_size: expected None where there is a comm, got {size}")

    def _check_renorm(self) -> None:
        """Refuse renorm together with what it cannot go with."""
        if self.renorm is not None and self.virtual_batch_size is not None:
            raise ValueError("renorm: expected None where there is a virtual_batch_size")
        if self.renorm is not None and (self.running_mean is None or self.running_var is None):
            raise ValueError("renorm: expected None where there are no running statistics")

    def _correction(
        self, of: Cache | Moments, mean: Array, var: Array, r_max: float, d_max: float
    ) -> tuple[Array, Array]:
        """Return r and d of batch renormalisation, float64, shape (C,)."""
        with np.errstate(divide="ignore", invalid="ignore"):  # eps may be 0
            std = np.sqrt(var + self.eps)
            r, d = np.sqrt(of.var + self.eps) / std, (of.mean - mean) / std
        return np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)

    def _refuse_too_few(self, x: Array, mask: ArrayLike | None, group: int | None) -> None:
        """Refuse a minibatch in which a channel, in some group, has less than two values."""
        count, why = x.size // self.num_features, ""
        if mask is not None:
            counted = checks.array("mask", mask, "bool")
            if counted.dtype == bool:  # batch_norm refuses others
                count = min(count, int(np.count_nonzero(counted)))
                why = f", of which mask leaves {count}"
        elif group is not None and x.ndim > 1:
            examples = self._examples(x)
            count = min(examples % group or group, examples) * (count // max(1, examples))
            why = f", in groups of {group} examples"
        if count < 2:
            words = "more than one value per channel to take statistics of"
            raise ValueError(f"x: expected {words}, got shape {x.shape}{why}")

    def _options(self) -> str:
        renorm = "" if self.renorm is None else f", renorm={self.renorm}"
        comm = "" if self.comm is None else f", comm=<rank {self.comm.rank} of {self.comm.size}>"
        return f"{super()._options()}, virtual_batch_size={self.virtual_batch_size}{renorm}{comm}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "comm": None}
