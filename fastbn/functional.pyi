from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

class Cache:
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def var(self) -> NDArray[np.float64]: ...

def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], Cache]: ...
def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
def batch_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def inference_with_cache(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
) -> tuple[NDArray[Any], Cache]: ...
def update_running(
    cache: Cache, mean: NDArray[np.float64], var: NDArray[np.float64], weight: float
) -> None: ...
def use_kernels(module: ModuleType) -> None: ...
