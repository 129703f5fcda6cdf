"""What is measured: one table of shapes, and the arrays and right answers of one of them."""

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache

import ml_dtypes
import numpy as np

from fastbn import reference

EPS = 1e-5
AXIS = {"NCHW": 1, "NHWC": -1, "NC": 1, "CM": 0}  # CM: the course's (n_h, m)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = sorted({1, CORES})

# ResNet-50's batch norms as (channels, height = width): how many of its 53 have this shape.
RESNET50 = {
    (64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5,
    (256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4,
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    family: str
    layout: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    count: int = 1  # how often it occurs in its network

    def __str__(self):
        return f"{self.layout}-{'x'.join(map(str, self.shape))}-{self.dtype}".lower()

    @property
    def nchw(self):
        n, *image, c = self.shape
        return (n, c, *image) if self.layout == "NHWC" else self.shape


def images(family, n, c, h, w, **more):
    yield Workload(family, "NCHW", (n, c, h, w), **more)
    yield Workload(family, "NHWC", (n, h, w, c), **more)


WORKLOADS = [
    *(w for (c, h), n in RESNET50.items() for w in images("ResNet-50", 32, c, h, h, count=n)),
    *(Workload("MLP", "NC", s) for s in [(64, 64), (256, 1024), (4096, 1024), (100_000, 64)]),
    *(Workload("course", "CM", shape) for shape in [(20, 500), (64, 64), (128, 5000)]),
    *images("few channels", 256, 3, 64, 64),
    *images("few channels", 1, 3, 1000, 1000),
    *(Workload("tiny", "NC", shape) for shape in [(8, 4), (32, 16)]),
    *(
        workload
        for dtype in ["float64", "float16", "bfloat16"]
        for workload in [
            *images("other dtypes", 32, 256, 28, 28, dtype=dtype),
            Workload("other dtypes", "NC", (100_000, 64), dtype),
        ]
    ),
]


class Data:
    """The arrays of a workload, what to make of them, and how far from that a result is."""

    def __init__(self, workload, offset=0.0):
        rng = np.random.default_rng(0)
        dtype = np.dtype(workload.dtype)
        parameters = np.promote_types(dtype, np.float32)
        self.workload = workload
        self._exact_of = self._exact_result = None
        self.axis = AXIS[workload.layout]
        channels = workload.shape[self.axis]
        x, dy = (rng.standard_normal(workload.shape, dtype=np.float32) for _ in range(2))
        self.x, self.dy = (x + np.float32(offset)).astype(dtype), dy.astype(dtype)
        self.gamma, self.beta = (rng.standard_normal(channels).astype(parameters) for _ in range(2))
        cache = self.forward[1]
        self.mean, self.var = (a.astype(parameters) for a in (cache.mean, cache.var))

    @cached_property
    def _exact(self):
        return [a.astype(np.float64) for a in (self.x, self.gamma, self.beta)]

    @cached_property
    def forward(self):
        return reference.batch_norm(*self._exact, axis=self.axis, eps=EPS)

    @cached_property
    def backward(self):
        return reference.batch_norm_backward(self.dy.astype(np.float64), self.forward[1])

    @cached_property
    def inference(self):
        x, *parameters = self._exact
        y = reference.batch_norm_inference(
            x, self.mean, self.var, *parameters, axis=self.axis, eps=EPS
        )
        return (y,)

    # Fused with ReLU, and with the addition of a residual before it.

    @cached_property
    def residual(self):
        """What is added. Nothing comes so close to 0 that rounding decides what ReLU does."""
        rng = np.random.default_rng(1)
        residual = rng.standard_normal(self.x.shape, dtype=np.float32)
        residual[abs(self.forward[0] + residual) < 1e-3] += np.float32(0.01)
        return residual

    @property
    def forward_relu(self):
        return self._fused(self.clear_of_zero)

    @property
    def backward_relu(self):
        return self._fused_backward(self.clear_of_zero)

    @property
    def forward_add_relu(self):
        return self._fused(self.x, self.residual)

    @property
    def backward_add_relu(self):
        return self._fused_backward(self.x, self.residual)

    @cached_property
    def clear_of_zero(self):
        """Return x without those values that batch norm would bring as close to 0 as that."""
        x, (y, cache) = self.x.copy(), self.forward
        x[abs(y) < 1e-3] += np.float32(0.02 * cache.var.max() ** 0.5)
        return x

    def _fused(self, x, residual=None):
        _, gamma, beta = self._exact
        return reference.batch_norm(
            x.astype(np.float64),
            gamma,
            beta,
            axis=self.axis,
            eps=EPS,
            activation="relu",
            residual=residual,
        )

    def _fused_backward(self, x, residual=None):
        cache = self._fused(x, residual)[1]
        return reference.batch_norm_backward(self.dy.astype(np.float64), cache)

    @property
    def eps(self):
        return float(ml_dtypes.finfo(self.x.dtype).eps)

    def error(self, operation, result):
        """Return the largest error over the largest value, in units of the dtype's eps."""
        if self._exact_of != operation:  # of one at a time: they are large
            self._exact_of, self._exact_result = operation, getattr(self, operation)[0]
        wanted = self._exact_result
        difference = result - wanted
        largest, scale = (max(a.max(), -a.min()) for a in (difference, wanted))
        return largest / scale / self.eps


@lru_cache(maxsize=1)  # the large ones hold a gigabyte
def data(workload):
    return Data(workload)
