from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.functional.moments import Moments

Array: TypeAlias = NDArray[Any]
Float64s: TypeAlias = NDArray[np.float64]

@final
class Cache:
    @property
    def mean(self) -> Float64s: ...
    @property
    def var(self) -> Float64s: ...
    @property
    def moments(self) -> Moments: ...

def forward(
    x: ArrayLike,
    statistics: Cache | Moments | Callable[[Moments], Moments] | tuple[ArrayLike, ArrayLike] | None,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: ArrayLike | None,
    mask: ArrayLike | None,
    group_size: int | None,
    out: Array | None,
    keep: bool = True,
) -> tuple[Array, Cache]: ...
def moments_of(x: ArrayLike, axis: int) -> Moments: ...
def merged(means: Float64s, lows: Float64s, variances: Float64s, counts: Float64s) -> Moments: ...
def update_running(cache: Cache, mean: Float64s, var: Float64s, weight: float) -> None: ...
def backward(dy: ArrayLike, cache: Cache, out: Array | None) -> tuple[Array, ...]: ...
def backward_reduce(dy: ArrayLike, cache: Cache) -> tuple[Array, Array]: ...
def backward_apply(
    dy: ArrayLike, cache: Cache, dgamma: ArrayLike, dbeta: ArrayLike, out: Array | None
) -> Any: ...
def use_kernels(module: ModuleType) -> None: ...
