"""What is measured: cases, and the arrays of one of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EPS = 1e-5
AXIS = {"NCHW": 1, "NHWC": -1, "NC": 1, "CM": 0}  # CM: the course's (n_h, m)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PLAIN = ("forward", "backward", "inference")
FUSED = ("forward_relu", "backward_relu", "forward_add_relu", "backward_add_relu")

# Arrays read and written at least. The backward pass of a residual writes two.
MOVED = {
    "forward": 2, "backward": 3, "inference": 2, "layer": 2,
    "forward_relu": 2, "backward_relu": 3, "forward_add_relu": 3, "backward_add_relu": 4,
}  # fmt: skip


# ResNet-50's batch norms as (channels, height = width): how many of its 53 have this shape.
RESNET50 = {
    (64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5,
    (256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4,
}  # fmt: skip
BATCH = 32
FEW = [(64, 56), (256, 56), (256, 14), (1024, 14), (2048, 7)]  # which 32 norms have


@dataclass(frozen=True)
class Case:
    """What is measured: an operation on an array of this shape and dtype."""

    operation: str
    layout: str
    shape: tuple[int, ...]
    threads: int
    dtype: str = "float32"
    count: int = 1  # how often it occurs in its network
    family: str = "ResNet-50"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.operation}-{self.layout.lower()}-{shape}-{self.dtype}-t{self.threads}"

    @property
    def bytes(self) -> int:
        """How many bytes the operation has to move at least."""
        itemsize = {"float32": 4, "float64": 8}.get(self.dtype, 2)
        return MOVED[self.operation] * prod(self.shape) * itemsize

    @property
    def arrays(self) -> Arrays:
        """The arrays of this shape. They are kept until those of another are asked for."""
        return _arrays(self.layout, self.shape, self.dtype)


class Arrays:
    """The arguments of an operation, and the array for its result."""

    def __init__(self, layout: str, shape: tuple[int, ...], dtype: str) -> None:
        rng = np.random.default_rng(0)
        kind = np.dtype(dtype)
        parameters = np.promote_types(kind, np.float32)
        self.axis = AXIS[layout]
        channels = shape[self.axis]
        # A prime number of values, repeated: no two channels are alike.
        some = rng.standard_normal((3, 65_537), dtype=np.float32).astype(kind)
        self.x, self.dy, self.residual = (np.resize(each, shape) for each in some)
        self.out = np.zeros_like(self.x)
        self.gamma, self.beta = rng.standard_normal((2, channels)).astype(parameters)
        others = tuple(i for i in range(len(shape)) if i != self.axis % len(shape))
        self.mean, self.var = (
            f(others, parameters).astype(parameters) for f in (self.x.mean, self.x.var)
        )

    @property
    def parameters(self) -> tuple[Array, Array, Array, Array]:
        """What inference takes besides x."""
        return self.gamma, self.beta, self.mean, self.var


@lru_cache(maxsize=1)  # the large ones hold half a gigabyte
def _arrays(layout: str, shape: tuple[int, ...], dtype: str) -> Arrays:
    return Arrays(layout, shape, dtype)


def images(
    operation: str, layout: str, threads: int, sizes: Iterable[tuple[int, int]]
) -> list[Case]:
    """Return an operation on shapes of ResNet-50."""
    return [
        Case(
            operation,
            layout,
            (BATCH, c, h, h) if layout == "NCHW" else (BATCH, h, h, c),
            threads,
            count=RESNET50[c, h],
        )
        for c, h in sizes
    ]


def short_cases(threads: int) -> list[list[Case]]:
    """Return the cases of the short table, those of a line together."""
    lines = [
        (f, layout) for f in ("forward", "backward", "inference") for layout in ("NCHW", "NHWC")
    ]
    lines.append(("forward_add_relu", "NCHW"))
    return [
        *(images(operation, layout, threads, FEW) for operation, layout in lines),
        [Case("forward", "NC", (64, 64), threads, family="one call")],
    ]
