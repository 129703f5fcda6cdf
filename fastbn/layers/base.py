"""What the layers share: parameters, running statistics, modes, gradients, hooks, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import checks, functional
from fastbn.hooks import Handle, HookList

if TYPE_CHECKING:
    from fastbn.functional import Activation, Cache, Moments

Array = NDArray[Any]


class Norm(ABC):
    """A layer, all but its `forward`."""

    # The defaults are those of InstanceNorm; BatchNorm has its own.
    def __init__(
        self, num_features: int, *, axis: int = 1, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = False, track_running_stats: bool = False, dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:  # fmt: skip
        self.num_features = checks.integer("num_features", num_features, least=1)
        self.axis = checks.integer("axis", axis)
        self.eps = checks.eps("eps", eps)
        self.momentum = momentum
        if momentum is not None:
            self.momentum = checks.momentum(momentum, "None or a number")
        self.dtype = checks.dtype("dtype", dtype, checks.FLOATS)
        self.activation: Activation = checks.activation(activation)
        self.affine, self.track_running_stats, self.training = affine, track_running_stats, True
        self.params: dict[str, Array] = {}
        if affine:
            self.params["gamma"] = np.ones(self.num_features, self.dtype)
            self.params["beta"] = np.zeros(self.num_features, self.dtype)
        self.grads = {name: np.zeros_like(array) for name, array in self.params.items()}
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
        self._parameter("gamma")[...] = checks.values("gamma", value, self.num_features)

    @property
    def beta(self) -> Array:
        """The shift, shape (C,); assigning writes into the same array."""
        return self._parameter("beta")

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._parameter("beta")[...] = checks.values("beta", value, self.num_features)

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

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Do as `forward`."""
        return self.forward(*args, **kwargs)

    def _with_channels(self, x: ArrayLike) -> Array:
        """Return x as an array that has this layer's channels."""
        array = x if isinstance(x, np.ndarray) else checks.array("x", x)
        if not -array.ndim <= self.axis < array.ndim or array.shape[self.axis] != self.num_features:
            words = f"{self.num_features} channels on axis {self.axis}"
            raise ValueError(f"x: expected {words}, got shape {array.shape}")
        return array

    def _examples(self, x: Array) -> int:
        """Return how many examples x has: on axis 0, or on the last one where that has channels."""
        return int(x.shape[-1 if self.axis in (0, -x.ndim) else 0])

    def _weight(self) -> float:
        """Return the weight of the next minibatch in the running statistics."""
        return 1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum

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
            dx, the gradient with respect to x; after a `forward` with residual (dx, dresidual).

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
        state = {name: np.array(array) for name, array in self._arrays().items()}
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
        entries = self.state_dict()
        checks.state(state, entries, f"the entries {', '.join(entries)};")
        targets = self._writeable(*self._arrays())
        # Copies of the final type: nothing can fail, and nothing alias, once writing begins.
        least, new = {"running_var": 0}, {}
        for name, target in targets.items():
            values = checks.values(name, state[name], self.num_features, least.get(name))
            new[name] = np.array(values, target.dtype)
        if self.track_running_stats:
            tracked = np.asarray(state["num_batches_tracked"])
            fits = tracked.shape == () and tracked.dtype.kind in "iu"
            if not fits or not 0 <= int(tracked) < 2**63:
                got = repr(state["num_batches_tracked"])
                raise ValueError(f"num_batches_tracked: expected one integer >= 0, got {got}")
            self.num_batches_tracked = int(tracked)
        for name, values in new.items():
            targets[name][...] = values

    def _arrays(self) -> dict[str, Array]:
        """Return the arrays of the state, not copied, under PyTorch's names."""
        arrays = {"weight": self.params.get("gamma"), "bias": self.params.get("beta")}
        arrays |= {"running_mean": self.running_mean, "running_var": self.running_var}
        return {name: array for name, array in arrays.items() if array is not None}

    def _writeable(self, *names: str) -> dict[str, Array]:
        """Return some of `_arrays`; refuse what a user has put there that cannot be written to."""
        shape, arrays = (self.num_features,), self._arrays()
        for name in names:
            array, got = arrays[name], type(arrays[name]).__name__
            if isinstance(array, np.ndarray):
                if array.dtype.kind == "f" and array.shape == shape and array.flags.writeable:
                    continue
                got = f"{array.dtype}, shape {array.shape}, writeable: {array.flags.writeable}"
            words = f"the layer to have a writeable array of floats of shape {shape}"
            raise ValueError(f"{name}: expected {words}, got {got}")
        return {name: arrays[name] for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_grad_hooks": HookList()}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, dtype={self.dtype}, "
            f"activation={self.activation!r})"
        )
