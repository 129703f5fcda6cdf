"""Run by test_large.py with failing_malloc: let each allocation of each call fail in turn."""

import copy
import ctypes
import gc
from functools import partial

import numpy as np

import fastbn

shim = ctypes.CDLL(None)
shim.arm.argtypes, shim.disarm.restype = [ctypes.c_long], ctypes.c_long


class Used(ctypes.Structure):
    """What mallinfo2 returns."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


shim.mallinfo2.restype = Used


def in_use():
    """Return the bytes that malloc has given out, to Python as well."""
    gc.collect()
    found = shim.mallinfo2()
    return found.field4 + found.field7  # from its heaps, from the system


def calls():
    """Yield (name, call, what may not change where it fails)."""
    rng = np.random.default_rng(0)
    # The second one is large enough for several threads.
    for shape in [(6, 5, 4), (40, 64, 400), (3, 9000)]:
        x = rng.standard_normal(shape, np.float32)
        out = np.zeros_like(x)
        gamma, beta = np.ones((2, x.shape[1]), np.float32)
        mask = rng.random([n for i, n in enumerate(x.shape) if i != 1]) < 0.7
        forward, backward = fastbn.batch_norm, fastbn.batch_norm_backward
        for name, options in {
            "plain": {},
            "relu": {"activation": "relu", "residual": x},
            "groups": {"virtual_batch_size": 2},
            "mask": {"mask": mask},
        }.items():
            _, cache = forward(x, gamma, beta, **options)
            yield f"forward, {name}", partial(forward, x.astype(">f4"), gamma, **options), []
            yield f"forward with out, {name}", partial(forward, x, out=out, **options), [out]
            yield f"backward with out, {name}", partial(backward, x, cache, out=out), [out]
        parts = [fastbn.batch_moments(x[:1]), fastbn.batch_moments(x[1:])]
        yield "moments", partial(fastbn.batch_moments, x), []
        yield "merge", partial(fastbn.merge_moments, *parts), []
        layer = fastbn.BatchNorm(x.shape[1])
        yield "layer", partial(layer, x), [layer.running_mean, layer.running_var]
        layer.backward(x)
        yield "optimizer", fastbn.optim.Adam([layer]).step, [layer.gamma, layer.beta]


def let_each_fail(call, changes):
    """Let the first allocation of a call fail, then the second, until all are through."""
    for n in range(10_000):
        before = copy.deepcopy(changes)
        shim.arm(n)
        try:
            call()
        except (MemoryError, SystemError) as error:
            shim.disarm()
            # In a ufunc or an index NumPy reports failure but forgets to say which.
            if isinstance(error, SystemError) and "without" not in str(error):
                raise
            for array, old in zip(changes, before, strict=True):
                assert array.tobytes() == old.tobytes()
        else:
            if shim.disarm() <= n:
                return n
    raise AssertionError("no end")


for threads in (1, 3):
    fastbn.set_num_threads(threads)
    for name, call, changes in calls():
        call()  # what it imports is there
        for _ in range(2):  # caches of all kinds fill
            let_each_fail(call, changes)
        before = in_use()
        n = let_each_fail(call, changes)
        leaked = in_use() - before
        print(f"{name}, {threads} threads: {n} allocations, {leaked} bytes more", flush=True)
        assert leaked < 4096
