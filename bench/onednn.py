"""Batch normalisation by oneDNN, called through a small C++ harness; for the benchmarks.

It needs `pip install onednn-cpu-gomp onednn-devel-cpu-gomp` and a C++ compiler (`CXX` or g++).
Only the oneDNN primitive runs in `forward`, `backward` and `inference`, on buffers of the case.
"""

import ctypes
import functools
import weakref
from importlib import metadata
from pathlib import Path

import compiled
import numpy as np

LAYOUTS = ("plain", "blocked", "channels_last")
SOURCE = Path(__file__).with_name("onednn.cpp")


def load(threads):
    """Return the library set to run on so many threads, or raise ImportError."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return Library(_functions(), threads)


class Library:
    def __init__(self, functions, threads):
        self._functions, self._threads = functions, threads

    def prepare(self, shape, layout):
        """Return a case: buffers for NCHW `shape`, held in one of LAYOUTS."""
        return Case(self._functions, tuple(shape), LAYOUTS.index(layout), self._threads)


class Case:
    """Call `set` first, then `forward`, which `backward` and `inference` take mean and var from."""

    def __init__(self, functions, shape, layout, threads):
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape must be four positive numbers, not {shape}")
        self._full, self._channels = shape, shape[1:2]
        self._functions, self._run = functions, functions.bn_run
        self._handle = ctypes.c_void_p()
        handle, sizes = ctypes.byref(self._handle), (ctypes.c_int64 * 4)(*shape)
        _check(functions.bn_create(handle, sizes, layout, threads))
        weakref.finalize(self, functions.bn_destroy, self._handle)

    def set(self, x, dy, gamma, beta, eps):
        """Copy the arrays to the case's layout; build the primitives, which hold eps."""
        arrays = [np.require(a, np.float32, "C") for a in (x, dy, gamma, beta)]
        if [a.shape for a in arrays] != [self._full] * 2 + [self._channels] * 2:
            raise ValueError(f"two arrays must be of shape {self._full}, two of {self._channels}")
        _check(self._functions.bn_set(self._handle, _pointers(arrays), ctypes.c_float(eps)))

    def forward(self):
        _check(self._run(self._handle, 0))

    def backward(self):
        _check(self._run(self._handle, 1))

    def inference(self):
        _check(self._run(self._handle, 2))

    def get(self):
        """Return copies of the results in NCHW; y is that of the last forward or inference."""
        results = {name: np.empty(self._full if name in ("y", "dx") else self._channels, np.float32)
                   for name in ("y", "mean", "var", "dx", "dgamma", "dbeta")}  # fmt: skip
        _check(self._functions.bn_get(self._handle, _pointers(results.values())))
        return results


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))


def _check(message):
    if message is not None:
        raise RuntimeError(f"oneDNN: {message.decode()}")


@functools.cache
def _functions():
    library = _located("onednn-cpu-gomp", "libdnnl.so.3")
    include = _located("onednn-devel-cpu-gomp", "oneapi/dnnl/dnnl.hpp").parents[2]
    functions = compiled.load(
        SOURCE, "-O2", f"-I{include}", str(library), f"-Wl,-rpath,{library.parent}",
        version=metadata.version("onednn-cpu-gomp"),
    )  # fmt: skip
    for function in functions.bn_create, functions.bn_set, functions.bn_run, functions.bn_get:
        function.restype = ctypes.c_char_p
    return functions


def _located(package, name):
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed; the oneDNN harness needs it") from None
    for file in files:
        if file.as_posix().endswith(f"/{name}") and Path(file.locate()).exists():
            return Path(file.locate()).resolve()
    raise ImportError(f"{package} is installed without {name}")
