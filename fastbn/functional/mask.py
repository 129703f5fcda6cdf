"""Masks: which positions of x count."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import checks

Array = NDArray[Any]


def checked_mask(mask: ArrayLike, shape: tuple[int, ...], axis: int) -> Array:
    """Return the mask as an array: bool, of x's shape without the channel axis."""
    channel_axis = checks.axis(axis, len(shape)) % len(shape)
    given = checks.array("mask", mask, "bool")
    if given.dtype != bool:
        raise TypeError(f"mask: expected bool, got {given.dtype}")
    expected = shape[:channel_axis] + shape[channel_axis + 1 :]
    if given.shape != expected:
        raise ValueError(
            f"mask: expected shape {expected}, x's without axis {axis}, got {given.shape}"
        )
    return given


def by_memory(x: Array, axes: Iterable[int]) -> list[int]:
    """Return the axes in the order that they have in the memory of x, which has no gaps."""
    return sorted(axes, key=lambda i: (-x.strides[i], x.shape[i] == 1))


def laid_out(x: Array, order: list[int]) -> Array:
    """Return a copy of x whose axes have this order in memory."""
    copied: Array = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    return copied


def flatten(mask: Array, others: list[int]) -> Array:
    """Return the mask in the order of memory, which is that of `others`, x's axes but one."""
    return np.ascontiguousarray(mask.transpose(np.argsort(np.argsort(others)))).reshape(-1)


def bits(flat: Array) -> Array:
    """Return a bit for each position, 16 in a word, and two words more."""
    words = np.zeros(flat.size // 16 + 3, "<u2")
    packed = np.packbits(flat, bitorder="little")
    words.view(np.uint8)[: packed.size] = packed
    return words.astype(np.uint16)
