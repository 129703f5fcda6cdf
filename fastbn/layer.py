"""The batch normalisation layer: parameters, running statistics and hooks around the functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import functional
from fastbn._hooks import Handle, HookList

Array = NDArray[Any]


class BatchNorm:
    """Batch normalisation with trainable scale and shift, and running statistics for inference.

    In training each channel is normalised by the minibatch, over the M values it has there::

        y = gamma * (x - mean) / sqrt(var + eps) + beta

    and the running statistics move towards the minibatch's, var made unbiased first::

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
    ) -> None:
        self.num_features = _integer("num_features", num_features, least=1)
        self.axis = _integer("axis", axis)
        self.eps = _number("eps", eps)
        if not (isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
        self.momentum = None if momentum is None else _number("momentum", momentum)
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum: expected None or a number from 0 to 1, got {momentum}")
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype: expected float32 or float64, got {self.dtype}")
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.training = True
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        if affine:
            self.params["gamma"] = np.ones(self.num_features, self.dtype)
            self.params["beta"] = np.zeros(self.num_features, self.dtype)
            self.grads["gamma"] = np.zeros(self.num_features, self.dtype)
            self.grads["beta"] = np.zeros(self.num_features, self.dtype)
        self.running_mean = np.zeros(self.num_features) if track_running_stats else None
        self.running_var = np.ones(self.num_features) if track_running_stats else None
        self.num_batches_tracked = 0
        self._cache: functional.Cache | None = None
        self._grad_hooks = HookList()

    @property
    def gamma(self) -> Array:
        """The scale, shape (C,); assigning writes into the same array."""
        return self._parameter("gamma")

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        self._parameter("gamma")[...] = _values("gamma", value, self.num_features)

    @property
    def beta(self) -> Array:
        """The shift, shape (C,); assigning writes into the same array."""
        return self._parameter("beta")

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._parameter("beta")[...] = _values("beta", value, self.num_features)

    def _parameter(self, name: str) -> Array:
        if not self.affine:
            raise AttributeError(f"{name}: this layer has none, it was made with affine=False")
        return self.params[name]

    def train(self, mode: bool = True) -> BatchNorm:
        """Switch to training (or, with ``mode=False``, to evaluation); return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Switch to evaluation, which uses the running statistics; return the layer."""
        return self.train(False)

    def __call__(self, x: ArrayLike) -> Array:
        """Return `forward(x)`."""
        return self.forward(x)

    def forward(self, x: ArrayLike) -> Array:
        """Normalise x, and in training update the running statistics.

        Parameters
        ----------
        x : array_like of float16, bfloat16, float32 or float64
            With `num_features` channels on `axis`. It must not change before `backward`.

        Returns
        -------
        ndarray
            y, of x's shape and dtype.

        Raises
        ------
        TypeError
            If x is of another type.
        ValueError
            If x has another number of channels, or in training one value per channel or none.
        """
        if not isinstance(x, np.ndarray):
            try:
                x = np.asarray(x)
            except ValueError as error:
                raise ValueError(f"x: expected an array_like of numbers, got {error}") from None
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"x: expected {self.num_features} channels on axis {self.axis}, got shape {x.shape}"
            )
        gamma, beta = self.params.get("gamma"), self.params.get("beta")
        if not self.training and self.running_mean is not None and self.running_var is not None:
            y, self._cache = functional.inference_with_cache(
                x, self.running_mean, self.running_var, gamma, beta, self.axis, self.eps
            )
            return y
        if x.size < 2 * self.num_features:
            raise ValueError(
                "x: expected more than one value per channel to take statistics of, "
                f"got shape {x.shape}"
            )
        y, self._cache = functional.batch_norm(x, gamma, beta, axis=self.axis, eps=self.eps)
        if self.training:
            self._track(self._cache)
        return y

    def _track(self, cache: functional.Cache) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        functional.update_running(cache, self.running_mean, self.running_var, weight)

    def backward(self, dy: ArrayLike) -> Array:
        """Take the gradient of the loss back through the last `forward`.

        Fills `grads`, then runs the hooks of `register_grad_hook`. After a forward pass in
        evaluation the statistics count as constants.

        Parameters
        ----------
        dy : array_like
            Gradient of the loss with respect to y: of its shape and dtype.

        Returns
        -------
        ndarray
            dx, the gradient with respect to x.

        Raises
        ------
        RuntimeError
            If there was no forward pass.
        TypeError, ValueError
            If dy is of another dtype or shape than x was.
        """
        if self._cache is None:
            raise RuntimeError("backward: there was no forward pass to go back through")
        dx, dgamma, dbeta = functional.batch_norm_backward(dy, self._cache)
        if self.affine:
            self.grads["gamma"][...] = dgamma
            self.grads["beta"][...] = dbeta
        self._grad_hooks.run(self)
        return dx

    def register_grad_hook(self, hook: Callable[[BatchNorm], object]) -> Handle:
        """Have `hook(layer)` called at the end of each `backward`, after `grads` are filled.

        Returns
        -------
        Handle
            Its `remove()` unregisters the hook.
        """
        return self._grad_hooks.register(hook)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and running statistics under the keys that PyTorch uses.

        Returns
        -------
        dict of str to ndarray
            weight (gamma) and bias (beta) if affine; running_mean, running_var and
            num_batches_tracked if there are running statistics.
        """
        state = {name: np.array(array) for name, array in self._state().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, dtype=np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict`, of this library or of PyTorch, returned.

        Parameters
        ----------
        state : mapping of str to array_like
            Exactly the entries that this layer's `state_dict` has.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing, unknown, of the wrong shape or no number; nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(
                f"state: expected the entries {', '.join(expected)}; "
                f"missing: {', '.join(sorted(expected.keys() - state.keys())) or 'none'}, "
                f"unknown: {', '.join(sorted(map(str, state.keys() - expected.keys()))) or 'none'}"
            )
        targets = self._state()
        # Copies of the final type: nothing can fail, and nothing alias, once writing begins.
        checked = {
            name: np.array(_values(name, state[name], self.num_features), target.dtype)
            for name, target in targets.items()
        }
        if "running_var" in checked and (checked["running_var"] < 0).any():
            raise ValueError(
                f"running_var: expected values >= 0, got {checked['running_var'].min()}"
            )
        if self.track_running_stats:
            tracked = np.asarray(state["num_batches_tracked"])
            fits = tracked.shape == () and tracked.dtype.kind in "iu"
            if not fits or not 0 <= int(tracked) < 2**63:
                raise ValueError(
                    "num_batches_tracked: expected one integer >= 0, "
                    f"got {state['num_batches_tracked']!r}"
                )
            self.num_batches_tracked = int(tracked)
        for name, values in checked.items():
            targets[name][...] = values

    def _state(self) -> dict[str, Array]:
        """Return the live arrays of the state under PyTorch's names."""
        arrays = {
            "weight": self.params.get("gamma"),
            "bias": self.params.get("beta"),
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_grad_hooks": HookList()}

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, dtype={self.dtype})"
        )


def _integer(name: str, value: int, least: int | None = None) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a number, got str")
    try:
        return float(value)
    except (TypeError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None


def _values(name: str, value: ArrayLike, count: int) -> Array:
    """Return value as an array of `count` floats, checked."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {array.shape}")
    return array
