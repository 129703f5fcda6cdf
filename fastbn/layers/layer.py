"""The normalisation layers, as PyTorch has them, around the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import functional
from fastbn.layers.norm import Array, Norm, as_array, as_eps, as_integer, as_number, as_values

if TYPE_CHECKING:
    from fastbn.functional import Activation, Cache


class BatchNorm(Norm):
    """Batch normalisation with trainable scale and shift, and running statistics for inference.

    In training each channel is normalised by the minibatch, over the M values it has there::

        y = gamma * (x - mean) / sqrt(var + eps) + beta

    (then, where asked for, ``y = act(y + residual)`` in the same pass over memory), and the running
    statistics move towards the minibatch's, var made unbiased first::

        running = (1 - momentum) * running + momentum * new

    In evaluation (after `eval()`) the running statistics take the place of mean and var. The
    layer belongs between a linear map without bias and the activation.

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
    affine : bool
        Whether the layer has gamma and beta.
    track_running_stats : bool
        Whether the layer keeps running statistics. Without them evaluation uses the minibatch.
    dtype : dtype
        Of gamma and beta and their gradients: float32 or float64.
    activation : None, "relu" or "leaky_relu"
        What follows, as in `batch_norm`; the layer is then normalisation and activation in one.
    virtual_batch_size : int or None
        In training, normalise so many examples at a time (ghost batch norm), as in `batch_norm`.
        The running statistics are those of the whole minibatch all the same.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        The parameters "gamma" and "beta", shape (C,), and their gradients, under the same keys;
        empty if not affine. Optimizers change the arrays in place.
    running_mean, running_var : ndarray of float64, shape (C,), or None
        The running statistics, 0 and 1 at first; var is unbiased.
    num_batches_tracked : int
        How many minibatches the running statistics have seen.
    training : bool
        Which of the two modes the layer is in.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    Different layers can be used from different threads; one layer is for one thread at a time.
    A copy (`copy.deepcopy`, pickle) has the state but neither the hooks nor the minibatch that
    `backward` would go back through.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
       Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> bn(np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> bn.running_mean
    array([0.2, 2. ])
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
        virtual_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            num_features, axis, eps, momentum, affine, track_running_stats, dtype, activation
        )
        if virtual_batch_size is not None:
            virtual_batch_size = as_integer("virtual_batch_size", virtual_batch_size, least=1)
        self.virtual_batch_size = virtual_batch_size

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
            is of another shape.
        """
        return self._forward(x, residual, mask)

    if TYPE_CHECKING:
        __call__ = forward

    def _group_size(self, x: Array, mask: ArrayLike | None) -> int | None:
        size = self.virtual_batch_size if self.training else None
        count, why = x.size // self.num_features, ""
        if mask is not None:
            mask = as_array("mask", mask, "bool")
            if mask.dtype == bool:  # others will be refused
                count = min(count, int(np.count_nonzero(mask)))
                why = f", of which mask leaves {count}"
        elif size is not None and x.ndim > 1:
            examples = x.shape[-1 if self.axis in (0, -x.ndim) else 0]
            count = min(examples % size or size, examples) * (count // max(1, examples))
            why = f", in groups of {size} examples"
        if count < 2:
            raise ValueError(
                "x: expected more than one value per channel to take statistics of, "
                f"got shape {x.shape}{why}"
            )
        return size

    def _move_running(self, cache: Cache, mean: Array, var: Array, weight: float) -> None:
        functional.update_running(cache, mean, var, weight)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, virtual_batch_size={self.virtual_batch_size})"

    def fold_into(
        self, weight: ArrayLike, bias: ArrayLike | None = None, *, axis: int = 0
    ) -> tuple[Array, Array]:
        """Return the preceding linear map or convolution with this layer folded into it.

        In evaluation the layer is a scale and a shift of each channel, so that one map does for
        both, with s = gamma / sqrt(running_var + eps) ::

            weight' = weight * s        bias' = (bias - running_mean) * s + beta

        computed in float64 and rounded once. What may come after the scale and the shift, an
        activation of this layer or a residual, is not part of it. Nothing is changed.

        Parameters
        ----------
        weight : array_like of float16, float32 or float64
            The weight of the map whose result the layer normalises. Its axis `axis` has
            `num_features` entries.
        bias : array_like, optional
            The bias of that map, `num_features` values in any shape; None stands for zeros.
        axis : int
            The axis of the output channels: 0 for PyTorch's linear layers and convolutions and the
            course's W in ``W @ A``, 1 for ``x @ W`` and PyTorch's transposed convolutions.

        Returns
        -------
        weight, bias : ndarray
            New arrays of weight's dtype; bias in the shape that it was given in, or (C,).

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        TypeError, ValueError
            If weight or bias is of another type or size, or weight has no such axis.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(2, eps=0)
        >>> bn.running_mean[:], bn.running_var[:] = [1, 2], [4, 16]
        >>> bn.fold_into(np.array([[2.0, 4.0], [8.0, 4.0]]))
        (array([[1., 2.],
               [2., 1.]]), array([-0.5, -0.5]))
        """
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError(
                "fold_into: expected running statistics, "
                "this layer was made with track_running_stats=False"
            )
        w = as_array("weight", weight)
        if w.dtype.kind != "f" or w.dtype.itemsize > 8:
            raise TypeError(f"weight: expected float16, float32 or float64, got {w.dtype}")
        axis = as_integer("axis", axis)
        if not -w.ndim <= axis < w.ndim or w.shape[axis] != self.num_features:
            raise ValueError(
                f"weight: expected {self.num_features} output channels on axis {axis}, "
                f"got shape {w.shape}"
            )
        b = np.zeros(self.num_features) if bias is None else as_array("bias", bias)
        if b.size != self.num_features:
            raise ValueError(f"bias: expected {self.num_features} values, got shape {b.shape}")
        flat = as_values("bias", b.ravel(), self.num_features)
        scale = self.params.get("gamma", 1) / np.sqrt(self.running_var + self.eps)
        shift = (flat - self.running_mean) * scale + self.params.get("beta", 0)
        columns = [1] * w.ndim
        columns[axis] = -1
        folded = w * scale.reshape(columns)
        return folded.astype(w.dtype), shift.reshape(b.shape).astype(w.dtype)

    @classmethod
    def from_keras(
        cls,
        weights: Sequence[ArrayLike],
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *,
        axis: int = -1,
        center: bool = True,
        scale: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> Self:
        """Make the layer that Keras's BatchNormalization with these weights is.

        In evaluation both give the same. Keras's running variance, of values divided by M, is taken
        as it is; further training moves it towards the unbiased one (divided by M - 1), which is
        larger by M / (M - 1).

        Parameters
        ----------
        weights : sequence of array_like, shape (C,)
            What ``get_weights()`` returns: gamma if `scale`, beta if `center`, moving_mean,
            moving_variance.
        momentum : float
            As in Keras, the weight of the old value; the layer has 1 - momentum.
        epsilon : float
            Added to the variance; the layer's eps.
        axis : int
            The channel axis.
        center, scale : bool
            Whether there is beta, and gamma. A layer has both or none: one that is missing in
            Keras is made of zeros or ones here, which further training would change.
        dtype : dtype
            Of gamma and beta: float32 or float64.

        Returns
        -------
        BatchNorm
            In training mode, as any new layer.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm.from_keras([[1, 1], [0, 0], [5, 6], [7, 8]], momentum=0.75)
        >>> bn.momentum, bn.eps, bn.running_mean
        (0.25, 0.001, array([5., 6.]))
        """
        names = {"weight": "gamma"} if scale else {}
        names |= {"bias": "beta"} if center else {}
        names |= {"running_mean": "moving_mean", "running_var": "moving_variance"}
        if isinstance(weights, Mapping | str) or not hasattr(weights, "__len__"):
            raise TypeError(f"weights: expected a list of arrays, got {type(weights).__name__}")
        if len(weights) != len(names):
            raise ValueError(
                f"weights: expected {len(names)} arrays, {', '.join(names.values())},"
                f" got {len(weights)}"
            )
        given = {
            key: (f"weights[{at}] ({name})", weights[at])
            for at, (key, name) in enumerate(names.items())
        }
        return cls._from_biased(given, momentum, epsilon, axis, dtype)

    @classmethod
    def from_onnx(
        cls,
        scale: ArrayLike,
        B: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> Self:
        """Make the layer that ONNX's BatchNormalization with these inputs and attributes is.

        In evaluation both give the same. ONNX's running variance, of values divided by M, is taken
        as it is, as in `from_keras`.

        Parameters
        ----------
        scale, B, mean, var : array_like, shape (C,)
            The inputs of the operator: gamma, beta, and the running statistics (input_mean and
            input_var).
        epsilon, momentum, dtype
            As in `from_keras`.
        axis : int
            The channel axis, in ONNX always 1.

        Returns
        -------
        BatchNorm
            In training mode, as any new layer.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm.from_onnx([2, 2], [1, 1], [5, 6], [4, 4], epsilon=0).eval()
        >>> bn(np.array([[5.0, 8.0]]))
        array([[1., 3.]])
        """
        given = {
            "weight": ("scale", scale),
            "bias": ("B", B),
            "running_mean": ("mean", mean),
            "running_var": ("var", var),
        }
        return cls._from_biased(given, momentum, epsilon, axis, dtype)

    @classmethod
    def _from_biased(
        cls,
        given: Mapping[str, tuple[str, ArrayLike]],
        momentum: float,
        epsilon: float,
        axis: int,
        dtype: DTypeLike,
    ) -> Self:
        """Make a layer from entries of its state, each with its name in Keras or ONNX."""
        old = as_number("momentum", momentum)
        if not 0 <= old <= 1:
            raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
        eps = as_eps("epsilon", epsilon)
        name, mean = given["running_mean"]
        shape = np.shape(mean)
        if len(shape) != 1 or not shape[0]:
            raise ValueError(f"{name}: expected one value per channel, got shape {shape}")
        values = {key: as_values(*each, *shape) for key, each in given.items()}
        if (values["running_var"] < 0).any():
            least = values["running_var"].min()
            raise ValueError(f"{given['running_var'][0]}: expected values >= 0, got {least}")
        affine = len(given) > 2
        bn = cls(*shape, axis=axis, eps=eps, momentum=1 - old, affine=affine, dtype=dtype)
        for key, array in values.items():
            bn._state()[key][...] = array
        return bn


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
    params, grads, running_mean, running_var, num_batches_tracked, training
        As in `BatchNorm`.

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

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:
        super().__init__(
            num_features, axis, eps, momentum, affine, track_running_stats, dtype, activation
        )

    def forward(self, x: ArrayLike, residual: ArrayLike | None = None) -> Array:
        """Normalise x, and in training update the running statistics, if there are any.

        Parameters, result and errors are those of `BatchNorm.forward`, but for the mask; where
        statistics are taken, it is an example that needs more than one position.
        """
        return self._forward(x, residual)

    if TYPE_CHECKING:
        __call__ = forward

    def _group_size(self, x: Array, mask: ArrayLike | None) -> int:  # noqa: ARG002
        examples = x.shape[-1 if self.axis in (0, -x.ndim) else 0]
        if x.ndim < 2 or x.size < 2 * self.num_features * max(1, examples):
            raise ValueError(
                "x: expected more than one position per example and channel to take statistics of, "
                f"got shape {x.shape}"
            )
        return 1

    def _move_running(self, cache: Cache, mean: Array, var: Array, weight: float) -> None:
        count = cache.moments.count / len(cache.mean)  # of each example and channel
        unbiased = cache.var.mean(axis=0) * (count / (count - 1))
        moved = (1 - weight) * mean + weight * cache.mean.mean(axis=0)
        var[...] = (1 - weight) * var + weight * unbiased
        mean[...] = moved


def update_statistics(
    layers: Sequence[Any],
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Replace running statistics by the exact ones over a data set ("precise batch norm").

    Each minibatch goes through the network with its norms in training mode, normalised by itself;
    means and variances of what the batch norms saw are pooled (`merge_moments`), instead of fading
    away as new minibatches come. Nothing else of the norms changes: modes, other running statistics
    and what their `backward` goes back through are afterwards what they were.

    Parameters
    ----------
    layers : sequence of layers
        The network. Those of type `BatchNorm` that keep running statistics are updated.
    batches : iterable
        What goes into the network, minibatch by minibatch.
    forward : callable, optional
        ``forward(batch)`` runs the network. By default the layers are called one after the other.

    Raises
    ------
    TypeError, ValueError
        If an argument is no iterable, no layer is a `BatchNorm` with running statistics, there are
        no batches, or the network leaves one of them out. Nothing is changed then, nor if `forward`
        fails.

    References
    ----------
    .. [1] Y. Wu, J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
       https://arxiv.org/abs/2105.07576

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(1)
    >>> fastbn.update_statistics([bn], [np.array([[1.0], [3.0]]), np.array([[5.0], [7.0]])])
    >>> bn.running_mean, bn.running_var
    (array([4.]), array([6.66666667]))
    """
    layers = list(_iterator("layers", layers))
    batches = _iterator("batches", batches)
    norms = [n for n in layers if isinstance(n, BatchNorm) and n.track_running_stats]
    if not norms:
        raise ValueError("layers: expected a BatchNorm with running statistics, got none")

    def one_after_the_other(batch: Any) -> None:
        for layer in layers:
            batch = layer(batch) if callable(layer) else layer.forward(batch)

    keeping = [n for n in layers if isinstance(n, Norm)]  # no other norm must move either
    before = [(norm.training, norm._cache, norm._seen) for norm in keeping]
    try:
        for norm in keeping:
            norm._seen = []
            norm.train()
        for batch in batches:
            (forward or one_after_the_other)(batch)
        seen = [norm._seen or [] for norm in norms]
    finally:
        for norm, state in zip(keeping, before, strict=True):
            norm.training, norm._cache, norm._seen = state
    if not all(seen):
        raise ValueError(
            "batches: expected one or more that go through every BatchNorm in layers, "
            f"got {[len(moments) for moments in seen]} for the {len(norms)} of them"
        )
    for norm, moments in zip(norms, seen, strict=True):
        mean, var, count = functional.merge_moments(*moments)
        arrays = norm._state()
        arrays["running_mean"][...] = mean
        arrays["running_var"][...] = var * (count / (count - 1))
        norm.num_batches_tracked = len(moments)


def _iterator(name: str, value: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(value)
    except TypeError:
        raise TypeError(f"{name}: expected an iterable, got {type(value).__name__}") from None
