"""Masks: gather the positions that count, and scatter results back."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import checks

Array = NDArray[Any]


class Valid:
    """The positions that a mask, of x's shape without the channel axis, leaves of arrays like x."""

    def __init__(self, mask: ArrayLike, x: Array, axis: int) -> None:
        self.channel_axis = checks.axis(axis, x.ndim) % x.ndim
        self.mask = checks.array("mask", mask, "bool").copy()  # the backward pass goes by it
        if self.mask.dtype != bool:
            raise TypeError(f"mask: expected bool, got {self.mask.dtype}")
        expected = tuple(n for i, n in enumerate(x.shape) if i != self.channel_axis)
        if self.mask.shape != expected:
            raise ValueError(
                f"mask: expected shape {expected}, x's without axis {axis}, got {self.mask.shape}"
            )
        self.count = int(np.count_nonzero(self.mask))
        # What dy and out must be like: x without its values.
        self.like = np.broadcast_to(np.empty((), x.dtype.newbyteorder("=")), x.shape)
        self.by_memory = np.argsort([-abs(stride) for stride in x.strides], kind="stable")
        # The gathered array has channels last if they are last in x's memory, else first.
        self.axis = 1 if self.by_memory[-1] == self.channel_axis else 0
        self.at = self.mask if self.axis else (slice(None), self.mask)

    def take(self, array: Array) -> Array:
        """Return the values at valid positions, with the channels on ``self.axis`` of two."""
        values: Array = self._channels_moved(array)[self.at]
        return values

    def put(self, values: Array, out: Array | None = None) -> Array:
        """Undo `take`: return an array (out, where given) that is 0 at the other positions."""
        if out is None:
            shape = [self.like.shape[i] for i in self.by_memory]
            out = np.empty(shape, values.dtype).transpose(np.argsort(self.by_memory))
        out[...] = 0
        self._channels_moved(out)[self.at] = values
        return out

    def _channels_moved(self, array: Array) -> Array:
        return np.moveaxis(array, self.channel_axis, -self.axis)
