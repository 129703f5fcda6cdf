"""What an argument must be, said once for the whole package.

Each function returns the value as its caller needs it, or raises TypeError (a wrong kind of thing)
or ValueError (a wrong value) with the name of the argument, what was expected and what came. The
compiled functions take what is plainly right by themselves and ask here about everything else.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import isfinite
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]

ACTIVATIONS = (None, "relu", "leaky_relu")


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return an integer, NumPy's as well, from `least` to `most`."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if most is not None and least is not None and not least <= number <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {number}")
    if least is not None and number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {number}")
    return number


def number(name: str, value: Any) -> float:
    """Return a float, made of any number."""
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a number, got str")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one beyond float64") from None


def eps(name: str, value: Any) -> float:
    """Return what is added to a variance: finite, and at least 0."""
    found = number(name, value)
    if not (isfinite(found) and found >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return found


def momentum(name: str, value: Any) -> float:
    """Return the weight of a value in a running average: from 0 to 1."""
    found = number(name, value)
    if not 0 <= found <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    return found


def axis(value: Any, ndim: int) -> int:
    """Return an axis of an array x of so many dimensions."""
    found = integer("axis", value)
    if not -ndim <= found < ndim:
        raise ValueError(f"axis: expected an axis of x, which has {ndim} dimension(s), got {found}")
    return found


def activation(value: Any) -> Any:
    """Return the name of an activation, or None."""
    if not isinstance(value, str | None) or value not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'relu' or 'leaky_relu', got {value!r}")
    return value


def dtype(name: str, value: DTypeLike, allowed: Collection[np.dtype[Any]]) -> np.dtype[Any]:
    """Return one of the dtypes that are allowed."""
    words = " or ".join(map(str, allowed))
    try:
        found = np.dtype("no dtype" if value is None else value)
    except TypeError:
        raise TypeError(f"{name}: expected {words}, got {value!r}") from None
    if found not in allowed:
        raise TypeError(f"{name}: expected {words}, got {found}")
    return found


def array(name: str, value: ArrayLike, of: str = "numbers") -> Array:
    """Return an array of whatever dtype."""
    try:
        return np.asarray(value)
    except ValueError as error:  # nested lists of unequal lengths
        raise ValueError(f"{name}: expected an array_like of {of}, got {error}") from None


def values(name: str, value: ArrayLike, count: int) -> Array:
    """Return an array of `count` real numbers, shape (count,)."""
    found = array(name, value)
    if found.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got dtype {found.dtype}")
    if found.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {found.shape}")
    return found


def iterator(name: str, value: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over what must be iterable."""
    try:
        return iter(value)
    except TypeError:
        raise TypeError(f"{name}: expected an iterable, got {type(value).__name__}") from None


def mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """Return a mapping as it is."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(value).__name__}")
    return value


def keys(name: str, found: Iterable[str], expected: Collection[str]) -> None:
    """Refuse a state whose keys are not just those expected."""
    missing = ", ".join(sorted(set(expected) - set(found))) or "none"
    unknown = ", ".join(sorted(map(str, set(found) - set(expected)))) or "none"
    if missing != "none" or unknown != "none":
        raise ValueError(
            f"{name}: expected the entries {', '.join(expected)}; "
            f"missing: {missing}, unknown: {unknown}"
        )
