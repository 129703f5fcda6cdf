"""What the layers share: parameters, running statistics, modes, hooks, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import isfinite
from operator import index
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import functional
from fastbn.hooks import Handle, HookList

if TYPE_CHECKING:
    from fastbn.functional import Activation, Cache, Moments

Array = NDArray[Any]


class Norm(ABC):
    """What the layers share; each says which examples are normalised together, and tracked."""

    def __init__(
        self,
        num_features: int,
        axis: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        dtype: DTypeLike,
        activation: Activation,
    ) -> None:
        self.num_features = as_integer("num_features", num_features, least=1)
        self.axis = as_integer("axis", axis)
        self.eps = as_eps("eps", eps)
        self.momentum = None if momentum is None else as_number("momentum", momentum)
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum: expected None or a number from 0 to 1, got {momentum}")
        try:
            self.dtype = np.dtype("no dtype" if dtype is None else dtype)
        except TypeError:
            raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype: expected float32 or float64, got {self.dtype}")
        if not isinstance(activation, str | None) or activation not in (None, "relu", "leaky_relu"):
            raise ValueError(
                f"activation: expected None, 'relu' or 'leaky_relu', got {activation!r}"
            )
        self.activation = activation
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
        self._cache: Cache | None = None
        self._seen: list[Moments] | None = None  # what update_statistics collects
        self._grad_hooks = HookList()

    @property
    def gamma(self) -> Array:
        """The scale, shape (C,); assigning writes into the same array."""
        return self._parameter("gamma")

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        self._parameter("gamma")[...] = as_values("gamma", value, self.num_features)

    @property
    def beta(self) -> Array:
        """The shift, shape (C,); assigning writes into the same array."""
        return self._parameter("beta")

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._parameter("beta")[...] = as_values("beta", value, self.num_features)

    def _parameter(self, name: str) -> Array:
        if not self.affine:
            raise AttributeError(f"{name}: this layer has none, it was made with affine=False")
        return self.params[name]

    def train(self, mode: bool = True) -> Self:
        """Switch to training (or, with ``mode=False``, to evaluation); return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation, which uses the running statistics; return the layer."""
        return self.train(False)

    @abstractmethod
    def forward(self, x: ArrayLike, residual: ArrayLike | None = None) -> Array:
        """Normalise x."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Have calls run `forward`, also where a subclass has one of its own."""
        super().__init_subclass__(**options)
        if "__call__" not in vars(cls):
            setattr(cls, "__call__", cls.forward)  # noqa: B010  mypy knows it from the classes

    @abstractmethod
    def _group_size(self, x: Array, mask: ArrayLike | None) -> int | None:
        """Return how many examples share statistics, None for all; refuse x with too few values."""

    @abstractmethod
    def _move_running(self, cache: Cache, mean: Array, var: Array, weight: float) -> None:
        """Move the running mean and var, in place, towards those of a minibatch."""

    def _forward(
        self, x: ArrayLike, residual: ArrayLike | None, mask: ArrayLike | None = None
    ) -> Array:
        if not isinstance(x, np.ndarray):
            x = as_array("x", x)
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"x: expected {self.num_features} channels on axis {self.axis}, got shape {x.shape}"
            )
        if not self.training and self.running_mean is not None and self.running_var is not None:
            y, self._cache = functional.inference_with_cache(
                x,
                self.running_mean,
                self.running_var,
                self.params.get("gamma"),
                self.params.get("beta"),
                self.axis,
                self.eps,
                self.activation,
                residual,
                mask,
            )
            return y
        y, cache = functional.batch_norm(
            x,
            self.params.get("gamma"),
            self.params.get("beta"),
            axis=self.axis,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
            virtual_batch_size=self._group_size(x, mask),
        )
        if self.training and self._seen is not None:
            self._seen.append(cache.moments)
        elif self.training and self.running_mean is not None and self.running_var is not None:
            tracked = self.num_batches_tracked + 1
            weight = 1 / tracked if self.momentum is None else self.momentum
            self._move_running(cache, self.running_mean, self.running_var, weight)
            self.num_batches_tracked = tracked
        self._cache = cache
        return y

    def backward(self, dy: ArrayLike) -> Any:
        """Take the gradient of the loss back through the last `forward`.

        Fills `grads`, then runs the hooks of `register_grad_hook`. After a forward pass in
        evaluation with running statistics, those count as constants.

        Parameters
        ----------
        dy : array_like
            Gradient of the loss with respect to y: of its shape and dtype.

        Returns
        -------
        ndarray
            dx, the gradient with respect to x. Where `forward` was given a residual, a pair:
            (dx, dresidual).

        Raises
        ------
        RuntimeError
            If there was no forward pass.
        TypeError, ValueError
            If dy is of another dtype or shape than x was.
        """
        if self._cache is None:
            raise RuntimeError("backward: there was no forward pass to go back through")
        dx, dgamma, dbeta, *dresidual = functional.batch_norm_backward(dy, self._cache)
        if self.affine:
            self.grads["gamma"][...] = dgamma
            self.grads["beta"][...] = dbeta
        self._grad_hooks.run(self)
        return (dx, *dresidual) if dresidual else dx

    def register_grad_hook(self, hook: Callable[[Self], object]) -> Handle:
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
            If an entry is missing, unknown, of the wrong shape or no number, or an array of this
            layer has been replaced by one that cannot take it; nothing is changed.
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
        for name, target in targets.items():
            fits = isinstance(target, np.ndarray) and target.dtype.kind == "f"
            if not (fits and target.shape == (self.num_features,) and target.flags.writeable):
                raise ValueError(
                    f"{name}: expected the layer to have a writeable array of floats of shape "
                    f"({self.num_features},), got {target!r:.60}"
                )
        # Copies of the final type: nothing can fail, and nothing alias, once writing begins.
        checked = {
            name: np.array(as_values(name, state[name], self.num_features), target.dtype)
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
            f"{type(self).__name__}({self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, dtype={self.dtype}, "
            f"activation={self.activation!r})"
        )


def as_integer(name: str, value: int, least: int | None = None) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return number


def as_number(name: str, value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a number, got str")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one beyond float64") from None


def as_eps(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not (isfinite(number) and number >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return number


def as_array(name: str, value: ArrayLike, of: str = "numbers") -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:  # nested lists of unequal lengths
        raise ValueError(f"{name}: expected an array_like of {of}, got {error}") from None


def as_values(name: str, value: ArrayLike, count: int) -> Array:
    """Return value as an array of `count` floats, checked."""
    array = as_array(name, value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {array.shape}")
    return array
