"""Minibatches of which some positions do not count: the others are put together, and back."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


class Valid:
    """The positions that a mask leaves of arrays like x.

    Parameters
    ----------
    mask : array_like of bool, of x's shape without `axis`
        Which positions count.
    x : ndarray
    axis : int
        The channel axis of x, known to be one.

    Raises
    ------
    TypeError, ValueError
        If mask is not of that shape and type.
    """

    def __init__(self, mask: ArrayLike, x: Array, axis: int) -> None:
        try:
            mask = np.array(mask)  # a copy: the backward pass goes by it
        except ValueError as error:  # nested lists of unequal lengths
            raise ValueError(f"mask: expected an array_like of bool, got {error}") from None
        if mask.dtype != bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        expected = tuple(n for i, n in enumerate(x.shape) if i != axis % x.ndim)
        if mask.shape != expected:
            raise ValueError(
                f"mask: expected shape {expected}, x's without axis {axis}, got {mask.shape}"
            )
        self.mask, self.shape, self.channel_axis = mask, x.shape, axis
        self.count = int(np.count_nonzero(mask))
        self.by_memory = np.argsort([-abs(stride) for stride in x.strides], kind="stable")
        # Values of a position lie together, or those of a channel: so they are put together.
        self.axis = 1 if self.by_memory[-1] == axis % x.ndim else 0
        self.at = mask if self.axis else (slice(None), mask)

    def take(self, array: Array) -> Array:
        """Return the values at valid positions, with the channels on ``self.axis`` of two."""
        values: Array = self._channels_moved(array)[self.at]
        return values

    def put(self, values: Array, out: Array | None = None) -> Array:
        """Undo `take`: return an array (out, where given) that is 0 at the other positions."""
        if out is None:
            shape = [self.shape[i] for i in self.by_memory]
            out = np.empty(shape, values.dtype).transpose(np.argsort(self.by_memory))
        out[...] = 0
        self._channels_moved(out)[self.at] = values
        return out

    def _channels_moved(self, array: Array) -> Array:
        return np.moveaxis(array, self.channel_axis, -self.axis)
