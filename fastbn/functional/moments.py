"""Mean and variance of some values, as a value of its own."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class _Moments(NamedTuple):
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    count: int  # type: ignore[assignment]  # it hides the method of tuple


class Moments(_Moments):
    """Mean and variance of each channel, over some values.

    Attributes
    ----------
    mean, var : ndarray of float64, shape (C,)
        var is biased (divided by count). Without values both are 0.
    count : int
        How many values each channel has.
    mean_low : ndarray of float64, shape (C,), or 0.0
        What mean loses in rounding, so that parts can be merged exactly where the mean is large.
        It is not an item of the tuple. Copies and pickle keep it; ``_replace`` loses it.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> mean, var, count = fastbn.batch_moments(np.array([[1.0], [3.0]]))
    >>> mean, var, count
    (array([2.]), array([1.]), 2)
    """

    mean_low: Any = 0.0


def check_moments(moments: Any, name: str, channels: int) -> None:
    """Raise unless `moments` is a Moments with this many channels."""
    if not isinstance(moments, Moments):
        raise TypeError(f"{name}: expected Moments, got {type(moments).__name__}")
    for field in ("mean", "var", "count"):
        value = np.asarray(getattr(moments, field))
        size = 1 if field == "count" else channels
        if value.dtype.kind not in "fiu" or value.size != size or value.ndim > (field != "count"):
            raise ValueError(
                f"{name}.{field}: expected {size} number(s), got {value.dtype} of shape "
                f"{value.shape}"
            )
        if field != "mean" and (value < 0).any():
            raise ValueError(f"{name}.{field}: expected values >= 0, got {value.min()}")
    if moments.count % 1:
        raise ValueError(f"{name}.count: expected an integer, got {moments.count}")
