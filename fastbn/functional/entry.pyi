from types import ModuleType
from typing import Any, TypeAlias

from numpy.typing import ArrayLike, NDArray

from fastbn.functional.cache import Cache
from fastbn.functional.moments import Moments

Array: TypeAlias = NDArray[Any]

def forward(
    x: ArrayLike,
    statistics: tuple[Any, Any, Any] | None,
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
def normalize_part(
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: ArrayLike | None,
    out: Array | None,
) -> tuple[Array, Cache]: ...
def moments_of(x: ArrayLike, axis: int) -> Moments: ...
def backward(dy: ArrayLike, cache: Cache, out: Array | None) -> tuple[Array, ...]: ...
def backward_reduce(dy: ArrayLike, cache: Cache) -> tuple[Array, Array]: ...
def backward_apply(
    dy: ArrayLike, cache: Cache, dgamma: ArrayLike, dbeta: ArrayLike, out: Array | None
) -> Any: ...
def use_kernels(module: ModuleType) -> None: ...
