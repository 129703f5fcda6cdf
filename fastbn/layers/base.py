"""What the layers share: parameters, running statistics, modes, gradients, hooks, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import checks, functional
from fastbn.hooks import Handle, HookList
from fastbn.layers.collective import exchange

if TYPE_CHECKING:
    from fastbn.functional import Activation, Cache, Moments
    from fastbn.layers.collective import Communicator

Array = NDArray[Any]


class Checked:
    """An attribute that is checked whoever sets it: the constructor or a user.

    Without `__get__` Python finds the value where any attribute is, so that reading costs nothing.
    """

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, layer: object, value: object) -> None:
        layer.__dict__[self._name] = self._check(self._name, value)


def checked(check: Callable[[str, Any], Any]) -> Any:
    """Return a `Checked` attribute, which for mypy may have any type."""
    return Checked(check)


def checked_or_none(check: Callable[[str, Any], Any]) -> Any:
    """Return a `Checked` attribute that may also be None."""
    return Checked(lambda name, value: None if value is None else check(name, value))


class Norm(ABC):
    """A layer, all but its `forward`."""

    num_features: int = checked(partial(checks.integer, least=1))
    axis: int = checked(checks.integer)
    eps: float = checked(checks.eps)
    momentum: float | None = checked_or_none(
        lambda _, value: checks.momentum(value, "None or a number")
    )
    dtype: np.dtype[Any] = checked(partial(checks.dtype, allowed=checks.FLOATS))
    activation: Activation = checked(lambda _, value: checks.activation(value))

    # The defaults are those of InstanceNorm; BatchNorm has its own.
    def __init__(
        self, num_features: int, *, axis: int = 1, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = False, track_running_stats: bool = False, dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:  # fmt: skip
        self.num_features, self.axis, self.eps, self.momentum = num_features, axis, eps, momentum
        self.dtype, self.activation = dtype, activation  # type: ignore[assignment]  # see Checked
        self.affine, self.track_running_stats, self.training = affine, track_running_stats, True
        self.params: dict[str, Array] = {}
        if affine:
            self.params["gamma"] = np.ones(self.num_features, self.dtype)
            self.params["beta"] = np.zeros(self.num_features, self.dtype)
        self.grads = {name: np.zeros_like(array) for name, array in self.params.items()}
        self.running_mean = np.zeros(self.num_features) if track_running_stats else None
        self.running_var = np.ones(self.num_features) if track_running_stats else None
        self.num_batches_tracked = 0
        self.frozen = False
        self.frozen_params: tuple[str, ...] = ()
        # What `backward` needs: the cache; with renorm r and d, as gamma was multiplied by r, and
        # gamma * d added to beta; with whose ranks the minibatch was shared.
        self._pass: tuple[Cache, tuple[Array, Array] | None, Communicator | None] | None = None
        self._keeps = True  # whether `backward` may follow in evaluation
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
        self.training, self._keeps = bool(mode), True
        return self

    def eval(self, *, backward: bool = True) -> Self:
        """Switch to evaluation, which uses the running statistics; return the layer.

        Parameters
        ----------
        backward : bool
            Whether `backward` may follow, for which the layer holds the last x. False is for
            serving: nothing of x stays, nor of the minibatch before. It ends with the next
            `train()` or `eval()`.
        """
        self.train(False)
        if not backward:
            self._keeps, self._pass = False, None
        return self

    def freeze(self, *, affine: bool = False) -> Self:
        """Use the running statistics as they are, in training too, until `unfreeze`.

        This is for fine-tuning: `train()` does not end it. Gradients take the statistics as
        constants. gamma and beta still train.

        Parameters
        ----------
        affine : bool
            Whether gamma and beta stay as well: their gradients are 0, and optimizers of
            `fastbn.optim` leave them alone, whatever their momentum or weight decay.

        Returns
        -------
        The layer.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        """
        if self.running_mean is None or self.running_var is None:
            given = "this layer was made with track_running_stats=False"
            raise RuntimeError(f"freeze: expected running statistics, {given}")
        self.frozen, self.frozen_params = True, tuple(self.params) if affine else ()
        return self

    def unfreeze(self) -> Self:
        """Take back `freeze`; return the layer."""
        self.frozen, self.frozen_params = False, ()
        return self

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

    def _constants(self) -> tuple[Array, Array] | None:
        """Return the running statistics where they normalise: in evaluation, and frozen."""
        mean, var = self.running_mean, self.running_var
        if (self.training and not self.frozen) or mean is None or var is None:
            return None
        return mean, var

    def _forward_by_constants(
        self, x: Array, constants: tuple[Array, Array], residual: ArrayLike | None,
        mask: ArrayLike | None = None,
    ) -> Array:  # fmt: skip
        """Normalise x by the running statistics."""
        keep = self.training or self._keeps
        y, cache = functional.inference_with_cache(
            x, *constants, self.params.get("gamma"), self.params.get("beta"), self.axis, self.eps,
            self.activation, residual, mask, keep,
        )  # fmt: skip
        self._pass = (cache, None, None) if keep else None
        return y

    def backward(self, dy: ArrayLike) -> Any:
        """Take the gradient of the loss back through the last `forward`.

        Fills `grads`, then runs the hooks of `register_grad_hook`. An entry of `grads` that is None
        gets a new array. After a forward pass by running statistics (in evaluation, or frozen),
        those count as constants.

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
            If there was no forward pass, or the layer keeps none (see `eval`).
        TypeError, ValueError
            If dy is of another dtype or shape than x was, or an entry of `grads` cannot take a
            gradient; nothing is changed.
        """
        if self._pass is None:
            keeps = self.training or self._keeps
            why = "" if keeps else ", the layer keeps none in eval(backward=False)"
            raise RuntimeError(f"backward: there was no forward pass to go back through{why}")
        cache, correction, comm = self._pass
        if comm is None:
            self._check_grads()
            dx, dgamma, dbeta, *dresidual = functional.batch_norm_backward(dy, cache)
        else:
            with exchange(comm, 2 * self.num_features) as gather:
                self._check_grads()
                dgamma, dbeta = functional.batch_norm_backward_reduce(dy, cache)
                rows = gather(np.concatenate([dgamma, dbeta]))
            # One after the other: how np.sum adds depends on the machine.
            sums = reduce(np.add, rows)
            of_gamma, of_beta = sums[: self.num_features], sums[self.num_features :]
            result = functional.batch_norm_backward_apply(dy, cache, of_gamma, of_beta)
            dx, *dresidual = result if isinstance(result, tuple) else (result,)
        if correction is not None:
            # y = (gamma * r) * z_hat + (gamma * d + beta), so far differentiated by the brackets
            r, d = correction
            dgamma = r * dgamma + d * dbeta
        for name, values in (("gamma", dgamma), ("beta", dbeta)):
            if name in self.params:
                if self.grads.get(name) is None:
                    self.grads[name] = np.zeros_like(self.params[name])
                self.grads[name][...] = 0 if name in self.frozen_params else values
        self._grad_hooks.run(self)
        return (dx, *dresidual) if dresidual else dx

    def _check_grads(self) -> None:
        """Refuse what a user has put into `grads` that cannot take a gradient."""
        shape = (self.num_features,)
        for name in self.params:
            grad = self.grads.get(name)
            # In most calls this is all; the text alone would cost more.
            if type(grad) is np.ndarray and grad.dtype.kind == "f" and grad.shape == shape:
                if grad.flags.writeable:
                    continue
            elif grad is None:
                continue
            self._check_target(f"grads[{name!r}]", grad)

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
            tracked = checks.array("num_batches_tracked", state["num_batches_tracked"])
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
        arrays = self._arrays()
        for name in names:
            self._check_target(name, arrays[name])
        return {name: arrays[name] for name in names}

    def _check_target(self, name: str, array: Any) -> None:
        """Refuse what a value per channel cannot be written to."""
        shape, got = (self.num_features,), type(array).__name__
        if isinstance(array, np.ndarray):
            if array.dtype.kind == "f" and array.shape == shape and array.flags.writeable:
                return
            got = f"{array.dtype}, shape {array.shape}, writeable: {array.flags.writeable}"
        words = f"the layer to have a writeable array of floats of shape {shape}"
        raise ValueError(f"{name}: expected {words}, got {got}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None, "_grad_hooks": HookList()}

    def __repr__(self) -> str:
        frozen = f".freeze(affine={bool(self.frozen_params)})" if self.frozen else ""
        return f"{type(self).__name__}({self._options()}){frozen}"

    def _options(self) -> str:
        """Return what the constructor was given."""
        return (
            f"{self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, dtype={self.dtype}, "
            f"activation={self.activation!r}"
        )
