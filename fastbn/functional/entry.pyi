from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.functional.moments import Moments

Array: TypeAlias = NDArray[Any]
Float64s: TypeAlias = NDArray[np.float64]
State: TypeAlias = tuple[Float64s, Array | None, int, float, bool, bool, bool, float, float]

BFLOAT16_BITS: np.dtype[Any]

@final
class Cache:
    @property
    def mean(self) -> Float64s: ...
    @property
    def var(self) -> Float64s: ...
    @property
    def moments(self) -> Moments: ...
    @property
    def state(self) -> State: ...

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
def update_running(cache: Cache, mean: Array, var: Array, weight: float) -> None: ...
def restored(x: Array, axis: int, group_size: int | None, state: State) -> Cache: ...
def backward(dy: ArrayLike, cache: Cache, out: Array | None) -> tuple[Array, ...]: ...
def backward_reduce(dy: ArrayLike, cache: Cache) -> tuple[Array, Array]: ...
def backward_apply(
    dy: ArrayLike, cache: Cache, dgamma: ArrayLike, dbeta: ArrayLike, out: Array | None
) -> Any: ...
def know_tensors(tensor: type, parameter: type, from_array: Any, slow_ways: Any) -> None: ...
def array_of(tensor: Any) -> Array | None: ...
def count_up(tensor: Any) -> bool: ...
def arrays_of(x: Any, residual: Any, *values: Any) -> list[Any] | None: ...
def forward_tensors(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Any,
    own: bool,
    each: bool,
    eps: float,
    activation: str | None,
    graded: bool,
    momentum: float | None = None,
    out: Array | None = None,
) -> tuple[Any, tuple[int | None, State] | None] | None: ...
def backward_tensors(
    dy: Any,
    x: Any,
    done: tuple[int | None, State],
    needed: tuple[bool, ...],
    out: Array | None = None,
) -> tuple[Any, ...]: ...
def use_kernels(module: ModuleType) -> None: ...
def aligned_like(array: Any) -> Array: ...
