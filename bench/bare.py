"""What one thread of this machine pays at least: `python bench/bare.py` prints it.

Bare loops (bare.cpp) over contiguous floats, and fastbn on channels of as many values, in turns.
Where fastbn is near the best bare loop that does the same, the machine is the limit.
"""

import ctypes
import functools
from pathlib import Path

import compiled
import numpy as np

import fastbn
from fastbn.cli.bench import race

SIZES = [(256, 14), (128, 28), (64, 56), (512, 28), (256, 56)]  # channels, height, at batch 32
TILES = [1 << 16, 1 << 18, 1 << 20, 1 << 22]  # bytes


@functools.cache
def _library():
    flags = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
    return compiled.load(Path(__file__).with_name("bare.cpp"), *flags)


def _call(name, arrays, *more):
    if not all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays):
        raise TypeError("arrays: expected contiguous float32")
    count = ctypes.c_ssize_t(arrays[0].size)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    getattr(_library(), name)(*pointers, count, *more)


def copy_past_cache(out, x):
    """Copy x with stores past the cache."""
    _call("copy_past_cache", (out, x))


def add_past_cache(out, x, dy):
    """Add x and dy with stores past the cache."""
    _call("add_past_cache", (out, x, dy))


def main():
    """Print nanoseconds per 16 floats, the median of rounds in turns."""
    fastbn.set_num_threads(1)
    print(f"caches {fastbn.runtime_info()['caches']}; one thread, ns per 16 floats\n")
    titles = ["MB", "copy", "copy past", "sums", "norm", "fastbn"]
    titles += ["add", "add past", "sums back", "back", "fastbn"]
    print(" ".join(f"{title:>9}" for title in titles))
    for channels, height in SIZES:
        shape = (32, channels, height, height)
        x, dy = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
        out = np.zeros_like(x)
        gamma = np.ones(channels, np.float32)
        _, cache = fastbn.batch_norm(x, gamma, gamma)
        ways = {
            "copy": functools.partial(np.copyto, out, x),
            "copy past": functools.partial(copy_past_cache, out, x),
            "sums": functools.partial(_call, "sums", (x, x)),
            "norm": functools.partial(fastbn.batch_norm, x, gamma, gamma, out=out),
            "add": functools.partial(np.add, x, dy, out=out),
            "add past": functools.partial(add_past_cache, out, x, dy),
            "sums back": functools.partial(_call, "sums", (x, dy)),
            "back": functools.partial(fastbn.batch_norm_backward, dy, cache, out=out),
        }
        for tile in TILES:
            for past in (False, True):
                more = (ctypes.c_ssize_t(tile // 4), ctypes.c_bool(past))
                ways[f"norm {tile} {past}"] = functools.partial(_call, "norm", (out, x), *more)
                ways[f"back {tile} {past}"] = functools.partial(
                    _call, "norm_back", (out, x, dy), *more
                )
        seconds = race(ways, tries=1)
        ns = {name: np.median(each) * 1e9 / (x.size / 16) for name, each in seconds.items()}
        best = {
            kind: min(ns[name] for name in ns if name.startswith(f"{kind} ") and name[5].isdigit())
            for kind in ("norm", "back")
        }
        row = [ns["copy"], ns["copy past"], ns["sums"], best["norm"], ns["norm"]]
        row += [ns["add"], ns["add past"], ns["sums back"], best["back"], ns["back"]]
        print(" ".join(f"{value:9.2f}" for value in [x.nbytes / 1e6, *row]))


if __name__ == "__main__":
    main()
