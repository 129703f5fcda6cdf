"""What an argument must be, where several rooms check the same.

Each function returns the value as its caller needs it, or raises TypeError (a wrong kind of thing)
or ValueError (a wrong value) with the name of the argument, what was expected and what came. The
compiled functions take what is plainly right by themselves, and ask here about the rest. What only
they check (arrays like x, out=) stands in `functional/arguments.pxi`. Which hyper-parameter of an
optimizer has which rule stands in `optim/base.py`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from math import isfinite
from operator import index
from sys import float_info
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]

ACTIVATIONS = (None, "relu", "leaky_relu")
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return an integer, NumPy's as well, from `least` to `most`."""
    try:
        found = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if (least is not None and found < least) or (most is not None and found > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected an integer {bounds}, got {_shown(found)}")
    return found


def number(name: str, value: Any) -> float:
    """Return a float, made of any number."""
    try:
        if isinstance(value, str | bytes | bytearray | memoryview):  # float would read it
            raise TypeError
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


def momentum(value: Any, words: str = "a number") -> float:
    """Return the weight of a value in a running average: from 0 to 1."""
    found = number("momentum", value)
    if not 0 <= found <= 1:
        raise ValueError(f"momentum: expected {words} from 0 to 1, got {value}")
    return found


def axis(value: Any, ndim: int) -> int:
    """Return an axis of an array x of so many dimensions."""
    found = integer("axis", value)
    if not -ndim <= found < ndim:
        raise ValueError(f"axis: expected an axis of x, which has {ndim} dimension(s), got {found}")
    return found


class Rule(NamedTuple):
    """What a hyper-parameter has to be: in words, as a type of Python, as a test."""

    words: str
    kind: Callable[[Any], Any]
    holds: Callable[[Any], bool]


FINITE = Rule("a finite number >= 0", float, lambda x: 0 <= x <= float_info.max)
SHARE = Rule("a number >= 0 and < 1", float, lambda x: 0 <= x < 1)


def hyper_parameter(name: str, value: Any, rule: Rule = FINITE) -> Any:
    """Return a value, which may be NumPy's, as the rule's type.

    Hyper-parameters come from files too, so the types are those that a file keeps: an integer is a
    float as well, and a list is a tuple, but neither text nor True is a number.
    """
    given = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    fits = type(given) is rule.kind or (type(given), rule.kind) in {(int, float), (list, tuple)}
    if not fits or not rule.holds(given):
        error = ValueError if fits else TypeError
        raise error(f"{name}: expected {rule.words}, got {_shown(value)}")
    return rule.kind(given)


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
    """Return an array of whatever dtype; what offers its memory by DLPack is not copied."""
    if isinstance(value, np.ma.MaskedArray):  # NumPy would forget the mask
        raise TypeError(f"{name}: expected an array without a mask, got a masked array")
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        # NumPy refuses another device, a type that it lacks, a tensor that requires a gradient.
        with suppress(BufferError, RuntimeError, TypeError, ValueError):
            foreign: Any = value
            return np.from_dlpack(foreign)
    try:
        return np.asarray(value)
    except ValueError as error:  # nested lists of unequal lengths
        raise ValueError(f"{name}: expected an array_like of {of}, got {error}") from None
    except (RuntimeError, TypeError) as error:  # of a library whose array it is
        given = type(value).__name__
        raise TypeError(f"{name}: expected an array_like of {of}, got {given}: {error}") from None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is one that the functions take, in either byte order."""
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def values(name: str, value: ArrayLike, count: int, least: float | None = None) -> Array:
    """Return an array of `count` real numbers, shape (count,), none of them below `least`.

    bfloat16, which NumPy does not know, comes back as float32: that of ml_dtypes, and of PyTorch.
    """
    if str(getattr(value, "dtype", None)) == "torch.bfloat16":
        value = value.float()  # type: ignore[union-attr]  # NumPy cannot read the tensor itself
    found = array(name, value)
    if found.dtype.name == "bfloat16":
        found = found.astype(np.float32)
    if found.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got dtype {found.dtype}")
    if found.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {found.shape}")
    if least is not None and (found < least).any():
        raise ValueError(f"{name}: expected values >= {least}, got {found.min()}")
    return found


def ndarray(
    name: str, value: Any, dtypes: Collection[np.dtype[Any]], shape: tuple[int, ...] | None = None
) -> Array:
    """Return an array as it is, of one of the dtypes, and of the shape if there is one."""
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes:
        given = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name}: expected ndarray of {' or '.join(map(str, dtypes))}, got {given}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
    return value


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


def communicator(name: str, value: Any, *methods: str) -> Any:
    """Return a communicator as it is: it has a rank, a size and these methods."""
    needed = ("rank", "size", "Allgather", *methods)
    lacking = [each for each in needed if not hasattr(value, each)]
    if lacking:
        raise TypeError(
            f"{name}: expected a communicator of mpi4py, or an object with {', '.join(needed)}, "
            f"got {type(value).__name__} without {', '.join(lacking)}"
        )
    return value


def state(value: Any, expected: Collection[str], words: str) -> None:
    """Refuse a state that has not just the entries expected; `words` says which they are."""
    found, wanted = set(mapping("state", value)), set(expected)
    if found != wanted:
        missing = ", ".join(sorted(wanted - found)) or "none"
        unknown = ", ".join(sorted(map(str, found - wanted))) or "none"
        raise ValueError(f"state: expected {words} missing: {missing}, unknown: {unknown}")


def _shown(value: Any) -> str:
    """Return the value as text; Python refuses to print the largest integers."""
    huge = type(value) is int and abs(value) >= 2**63
    return "an integer of 64 bits or more" if huge else repr(value)
