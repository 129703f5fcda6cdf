from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]
Activation: TypeAlias = Literal["relu", "leaky_relu"] | None

class Moments(NamedTuple):
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    count: int  # type: ignore[assignment]  # it hides the method of tuple
    @property
    def mean_low(self) -> Any: ...

class Cache:
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def var(self) -> NDArray[np.float64]: ...
    @property
    def moments(self) -> Moments: ...

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
) -> tuple[Array, Cache]: ...
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
) -> tuple[Array, Cache]: ...
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
) -> Array: ...

# (dx, dgamma, dbeta), or (dx, dgamma, dbeta, dresidual) where a residual was given.
def batch_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: Array | None = None
) -> tuple[Array, ...]: ...
def instance_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: Array | None = None
) -> tuple[Array, ...]: ...
def batch_moments(x: ArrayLike, *, axis: int = 1) -> Moments: ...
def merge_moments(*moments: Moments) -> Moments: ...
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
) -> tuple[Array, Cache]: ...
def batch_norm_backward_reduce(
    dy: ArrayLike, cache: Cache
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...

# dx, or (dx, dresidual) where a residual was given.
def batch_norm_backward_apply(
    dy: ArrayLike,
    cache: Cache,
    dgamma: ArrayLike,
    dbeta: ArrayLike,
    *,
    out: Array | None = None,
) -> Any: ...
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
) -> tuple[Array, Cache]: ...
def update_running(
    cache: Cache, mean: NDArray[np.float64], var: NDArray[np.float64], weight: float
) -> None: ...
def use_kernels(module: ModuleType) -> None: ...
