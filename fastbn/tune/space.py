"""Hyper-parameters and the scales they are searched on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fastbn.demo import require

if TYPE_CHECKING:
    from optuna.trial import Trial

Value: TypeAlias = bool | int | float | str | None
Params: TypeAlias = dict[str, Value]
Space: TypeAlias = "Mapping[str, Scale] | Sequence[Mapping[str, Scale]]"

# The box around the best few is this much wider on each side, as a share of the box before it.
MARGIN = 0.1


class Scale(ABC):
    """Where the values of a hyper-parameter lie, and how they are spread over the way from 0 to 1.

    A random search draws uniformly between the positions 0 and 1.
    """

    optuna: ClassVar[str]  # Optuna's name of the kind: Float, Int or Categorical

    @abstractmethod
    def at(self, position: float) -> Any:
        """Return the value at a position from 0 to 1, exactly the bounds at 0 and 1."""

    @abstractmethod
    def position(self, value: Any) -> float:
        """Return where a value lies, from 0 to 1: the inverse of `at`."""

    def ticks(self) -> list[Any]:
        """Return a few values to label an axis with."""
        return list(dict.fromkeys(self.at(k / 4) for k in range(5)))

    @abstractmethod
    def zoom(self, values: Iterable[Any], box: Any) -> Scale:
        """Return the part of this scale around some values; box is the part they were drawn in."""

    @abstractmethod
    def width(self, box: Any) -> float:
        """Return which share of this scale a part of it is."""

    def middle(self, value: Any) -> float:
        """Return the middle of the positions that have a value."""
        return self.position(value)

    @abstractmethod
    def __contains__(self, value: object) -> bool: ...

    # Optuna has its own name of the hyper-parameter, its own value, and a distribution of them.

    def key(self, name: str) -> str:
        """Return Optuna's name of the hyper-parameter."""
        return name

    def encode(self, value: Any) -> Any:
        """Return Optuna's value for ours."""
        return value

    def decode(self, encoded: Any) -> Any:
        """Return our value for Optuna's."""
        return encoded

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of Optuna's distribution."""
        return vars(self)

    def distribution(self) -> Any:
        """Return Optuna's distribution."""
        distributions = require("optuna", "tune").distributions
        return getattr(distributions, f"{self.optuna}Distribution")(**self.arguments())

    def suggest(self, trial: Trial, name: str) -> Any:
        """Let a trial of Optuna choose a value."""
        suggest = getattr(trial, f"suggest_{self.optuna.lower()}")
        return self.decode(suggest(self.key(name), **self.arguments()))


@dataclass(frozen=True)
class Uniform(Scale):
    """See `uniform`."""

    low: float
    high: float
    optuna = "Float"
    forth: ClassVar[Any] = staticmethod(float)  # a function to where the values are uniform
    back: ClassVar[Any] = staticmethod(float)

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))
        if not self.low < self.high:
            raise ValueError(f"high: expected a number above low = {self.low:g}, got {self.high:g}")

    def at(self, position: float) -> float:
        if position in (0, 1):  # the way there and back would round
            return self.high if position else self.low
        start, end = self.forth(self.low), self.forth(self.high)
        value = float(self.back(start + position * (end - start)))
        return min(max(value, self.low), self.high)

    def position(self, value: float) -> float:
        if value in (self.low, self.high):
            return float(value == self.high)
        start, end = self.forth(self.low), self.forth(self.high)
        position = float((self.forth(value) - start) / (end - start))
        return min(max(position, 0.0), 1.0)

    def width(self, box: Uniform) -> float:
        return self.position(box.high) - self.position(box.low)

    def zoom(self, values: Iterable[float], box: Uniform) -> Uniform:
        values, margin = list(values), MARGIN * self.width(box)
        low, high = min(values), max(values)
        below = self.at(max(self.position(low) - margin, 0))
        above = self.at(min(self.position(high) + margin, 1))
        return type(self)(min(below, low), max(above, high))

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high  # type: ignore[operator]


class LogUniform(Uniform):
    """See `log_uniform`."""

    forth = staticmethod(math.log10)
    back = staticmethod(lambda r: 10.0**r)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"low: expected a number above 0, got {self.low:g}")

    def arguments(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": True}


class OneMinusLogUniform(Uniform):
    """See `one_minus_log_uniform`."""

    forth = staticmethod(lambda value: math.log10(1 - value))
    back = staticmethod(lambda r: 1 - 10.0**r)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < 0:
            raise ValueError(f"low: expected a number from 0, got {self.low:g}")
        if self.high >= 1:
            raise ValueError(f"high: expected a number below 1, got {self.high:g}")

    # Optuna has no such distribution, but 1 - value it can draw.

    def key(self, name: str) -> str:
        return f"1 - {name}"

    def encode(self, value: float) -> float:
        return 1 - value

    def decode(self, encoded: float) -> float:
        for bound in (self.low, self.high):  # below 0.5, 1 - (1 - value) rounds
            if encoded == 1 - bound:
                return bound
        return min(max(1 - encoded, self.low), self.high)

    def arguments(self) -> dict[str, Any]:
        return {"low": 1 - self.high, "high": 1 - self.low, "log": True}


@dataclass(frozen=True)
class Integer(Scale):
    """See `integer`."""

    low: int
    high: int
    optuna = "Int"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name}: expected an integer, got {getattr(self, name)!r}")
        if self.low > self.high:
            raise ValueError(f"high: expected an integer from low = {self.low}, got {self.high}")

    def at(self, position: float) -> int:
        return min(self.low + int(position * (self.high - self.low + 1)), self.high)

    def position(self, value: int) -> float:
        return min(max((value - self.low) / (self.high - self.low or 1), 0.0), 1.0)

    def width(self, box: Integer) -> float:
        return (box.high - box.low + 1) / (self.high - self.low + 1)

    def middle(self, value: int) -> float:
        return (value - self.low + 0.5) / (self.high - self.low + 1)

    def zoom(self, values: Iterable[int], box: Integer) -> Integer:
        values, margin = list(values), MARGIN * (box.high - box.low + 1)
        low, high = math.ceil(min(values) - margin), math.floor(max(values) + margin)
        return Integer(max(low, self.low), min(high, self.high))

    def __contains__(self, value: object) -> bool:
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice(Scale):
    """See `choice`."""

    options: tuple[Value, ...]
    optuna = "Categorical"

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("options: expected at least one, got none")
        for index, value in enumerate(self.options):
            if not isinstance(value, bool | int | float | str | None):
                raise TypeError(f"options: expected numbers, text, booleans or None, got {value!r}")
            if value in self.options[:index]:
                raise ValueError(f"options: expected different ones, got {value!r} twice")

    def at(self, position: float) -> Value:
        return self.options[min(int(position * len(self.options)), len(self.options) - 1)]

    def position(self, value: Value) -> float:
        return self.options.index(value) / (len(self.options) - 1 or 1)

    def width(self, box: Choice) -> float:
        return len(box.options) / len(self.options)

    def middle(self, value: Value) -> float:
        return (self.options.index(value) + 0.5) / len(self.options)

    def ticks(self) -> list[Value]:
        return list(self.options)

    def zoom(self, values: Iterable[Value], box: Choice) -> Choice:  # noqa: ARG002
        """Return the options that some values have; options have no neighbours."""
        values = list(values)
        return Choice(tuple(option for option in self.options if option in values))

    def __contains__(self, value: object) -> bool:
        return value in self.options

    def arguments(self) -> dict[str, Any]:
        return {"choices": self.options}


def uniform(low: float, high: float) -> Scale:
    """Spread a number evenly between two bounds.

    Parameters
    ----------
    low, high : float
        Finite, ``low < high``.

    Returns
    -------
    Scale

    Raises
    ------
    TypeError, ValueError
        If a bound is not such a number.
    """
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Scale:
    """Spread a positive number evenly over its powers of ten, as for learning rates.

    The value is 10^r, r uniform from log10(low) to log10(high): between 1e-4 and 1 each of the four
    decades gets a quarter of the trials. On a linear scale the last decade gets 90% of them.

    Parameters
    ----------
    low, high : float
        ``0 < low < high``.

    Returns
    -------
    Scale

    Raises
    ------
    TypeError, ValueError
        If a bound is not such a number.

    Examples
    --------
    >>> log_uniform(1e-4, 1).at(0.5)
    0.01
    """
    return LogUniform(low, high)


def one_minus_log_uniform(low: float, high: float) -> Scale:
    """Spread a number just below 1 evenly over the powers of ten of its distance from 1.

    The value is 1 - 10^r, r uniform from log10(1 - low) to log10(1 - high). For momentum and Adam's
    betas: 0.9 averages over 10 steps, 0.99 over 100, 0.999 over 1000; what counts is
    1 / (1 - beta).

    Parameters
    ----------
    low, high : float
        ``0 <= low < high < 1``.

    Returns
    -------
    Scale

    Raises
    ------
    TypeError, ValueError
        If a bound is not such a number.

    Examples
    --------
    >>> one_minus_log_uniform(0.9, 0.999).at(0.5)
    0.99
    """
    return OneMinusLogUniform(low, high)


def integer(low: int, high: int) -> Scale:
    """Give each integer from low to high, both included, the same chance.

    Parameters
    ----------
    low, high : int
        ``low <= high``.

    Returns
    -------
    Scale

    Raises
    ------
    TypeError, ValueError
        If a bound is not such an integer.
    """
    return Integer(low, high)


def choice(*options: Value) -> Scale:
    """Give each of several options the same chance.

    Parameters
    ----------
    *options : bool, int, float, str or None
        One or more, all different.

    Returns
    -------
    Scale

    Raises
    ------
    TypeError, ValueError
        If they are not such options.
    """
    return Choice(options)


def tiers_of(space: Space) -> list[dict[str, Scale]]:
    """Return a space as its tiers, the most important first; a mapping is a single tier.

    Raises
    ------
    TypeError, ValueError
        If it is not a space.
    """
    tiers = [space] if isinstance(space, Mapping) else space
    if not isinstance(tiers, list | tuple):
        raise TypeError(f"space: expected a dict or a list of them, got {type(space).__name__}")
    seen: set[str] = set()
    for tier in tiers:
        if not isinstance(tier, Mapping):
            raise TypeError(f"space: expected a dict for each tier, got {type(tier).__name__}")
        for name, scale in tier.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"space: expected names as keys, got {name!r}")
            if not isinstance(scale, Scale):
                expected = f"space: {name}: expected a scale like log_uniform(1e-4, 1)"
                raise TypeError(f"{expected}, got {scale!r}")
            if name in seen:
                raise ValueError(f"space: expected each name once, got {name!r} in two tiers")
            seen.add(name)
    if not seen:
        raise ValueError("space: expected at least one hyper-parameter, got none")
    return [dict(tier) for tier in tiers if tier]
