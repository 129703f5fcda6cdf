from typing import Any, TypeAlias

from numpy import floating
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[floating[Any]]

def sgd(
    p: _Array,
    g: _Array,
    velocity: _Array,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None: ...
def rmsprop(
    p: _Array,
    g: _Array,
    v: _Array,
    velocity: _Array,
    lr: float,
    alpha: float,
    eps: float,
    momentum: float,
    weight_decay: float,
) -> None: ...
def adam(
    p: _Array,
    g: _Array,
    m: _Array,
    v: _Array,
    rate: float,
    beta1: float,
    beta2: float,
    correction: float,
    eps: float,
    weight_decay: float,
    keep: float,
) -> None: ...
def sum_of_squares(g: _Array) -> float: ...
