"""Memory at its ends: none left, none lost, and arrays past 2^31 values and 2^32 bytes."""

import os
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from support import assert_close, python

import fastbn

HERE = Path(__file__).parent
PRELOADED = "LD_PRELOAD" in os.environ  # a sanitizer wants to be the first


def needs(gib):
    """Skip where this much memory is not to be had."""
    info = Path("/proc/meminfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    free = [int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable")]
    if free and free[0] < gib * 2**20:
        pytest.skip(f"needs {gib} GiB of memory, {free[0] >> 20} are free")


@pytest.mark.skipif(sys.platform != "linux" or PRELOADED, reason="replaces malloc of glibc")
def test_no_allocation_that_fails_changes_or_leaks_anything(tmp_path):
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    library = tmp_path / "failing_malloc.so"
    source = [str(HERE / "failing_malloc.c"), "-o", str(library)]
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", *source], check=True)
    code = (HERE / "out_of_memory.py").read_text(encoding="utf-8")
    done = python(code, LD_PRELOAD=str(library), timeout=170)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) > 50
    assert sum("0 allocations" not in line for line in lines) > 40  # some were there to fail


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_calls_leak_nothing():
    code = """if True:
        import numpy as np, fastbn
        from pathlib import Path
        rng = np.random.default_rng(0)
        x = rng.standard_normal((6, 5, 7), np.float32)
        out, mask = np.empty_like(x), rng.random((6, 7)) < 0.8
        layer = fastbn.BatchNorm(5, activation="relu")
        sgd = fastbn.optim.SGD(layer, lr=0.01, momentum=0.9)
        def calls():
            y, cache = fastbn.batch_norm(x, activation="relu", residual=x)
            fastbn.batch_norm_backward(y, cache)
            fastbn.batch_norm_backward(y, fastbn.batch_norm(x, mask=mask)[1], out=out)
            fastbn.batch_norm(x[..., ::2], np.ones(5), virtual_batch_size=4)
            fastbn.instance_norm(x.astype(">f4"), out=out)
            fastbn.batch_norm_inference(x, np.zeros(5), np.ones(5))
            moments = fastbn.merge_moments(fastbn.batch_moments(x), fastbn.batch_moments(x))
            _, cache = fastbn.normalize(x, moments)
            fastbn.batch_norm_backward_apply(x, cache, *fastbn.batch_norm_backward_reduce(x, cache))
            layer(x), layer.backward(x), sgd.step()
            for wrong in ({"axis": 3}, {"gamma": [1]}, {"out": x[0]}, {"residual": x[0]}):
                try:
                    fastbn.batch_norm(x, **wrong)
                except ValueError:
                    pass
        def pages():
            return int(Path("/proc/self/statm").read_text().split()[1])
        for _ in range(500):
            calls()
        before = pages()
        for _ in range(5_000):
            calls()
        print((pages() - before) * 4096)
    """
    done = python(code, timeout=170)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**20  # 20 calls each: ten bytes a call would be seen


# ------------------------------------------------------------------------------------- large ones

PATTERN = np.float16([0, 1, 2, 5, -3, 7, 1, 3])


def repeated(shape):
    """Return an array of which PATTERN fills each channel, again and again."""
    x = np.empty(shape, np.float16)
    x.reshape(-1, len(PATTERN))[...] = PATTERN
    return x


def sample(array):
    """Return some places: at the ends, around 2^31 and 2^32 values and bytes, and between."""
    edges = [0, 2**30, 2**31, 2**32, array.size]
    near = [edge + step for edge in edges for step in range(-40, 40)]
    near += np.random.default_rng(0).integers(0, array.size, 10_000).tolist()
    return np.unique([place for place in near if 0 <= place < array.size])


SHAPES = {
    "one channel of more than 2^31 values": ((1, 1, 2**31 + 64), 1),
    "runs, more than 2^31 values": ((3, 2, 360_000_000), 1),
    "short runs": ((5_000_000, 18, 24), 1),
    "rows": ((2**31 // 64 + 999, 64), 1),
    "(n_h, m)": ((9, 240_000_000), 0),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_more_than_two_to_the_31_values(name):
    needs(10)
    shape, axis = SHAPES[name]
    assert prod(shape) > 2**31
    x = repeated(shape)
    y, cache = fastbn.batch_norm(x, axis=axis, out=np.empty_like(x))
    rows = x.shape[axis] > 1 and x.shape[-1] == x.shape[axis]
    at = sample(x)
    channels = np.unravel_index(at, shape)[axis]
    if rows:  # each channel has one value of the pattern, again and again
        np.testing.assert_array_equal(cache.var, 0)
        np.testing.assert_array_equal(cache.mean, np.resize(PATTERN, x.shape[axis]))
    else:
        np.testing.assert_allclose(cache.mean, PATTERN.mean(dtype=float), rtol=1e-12)
        np.testing.assert_allclose(cache.var, PATTERN.var(dtype=float), rtol=1e-12)
    exact = x.ravel()[at].astype(float) - cache.mean[channels]
    exact /= np.sqrt(cache.var[channels] + 1e-5)
    assert_close(y.ravel()[at], exact)
    # And back: dy = y, so dx is what is left of it beside eps, and dgamma the sum of y^2.
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, cache, out=y)
    assert dx is y
    count = x.size // x.shape[axis]
    wanted = count * cache.var / (cache.var + 1e-5)
    np.testing.assert_allclose(dgamma, wanted, rtol=1e-3)
    np.testing.assert_allclose(dbeta, 0, atol=1e-3 * count)
    assert np.abs(dx.ravel()[at].astype(float)).max() < 0.01


@pytest.mark.long
def test_more_than_two_to_the_32_bytes_in_place():
    needs(7)
    x = np.empty((5, 3, 80_000_000), np.float32)
    assert x.nbytes > 2**32
    x.reshape(-1, 8)[...] = PATTERN
    at = sample(x)
    before = x.ravel()[at].astype(float)
    y, _ = fastbn.batch_norm(x, out=x)
    exact = (before - PATTERN.mean(dtype=float)) / np.sqrt(PATTERN.var(dtype=float) + 1e-5)
    assert y is x
    assert_close(y.ravel()[at], exact)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(3, 10_000_000), (3, 10_000_000, 2)])
def test_ten_million_channels(shape):
    needs(6)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    y, cache = fastbn.batch_norm(x)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(x, cache)
    for first in (0, 5_000_000, 9_999_000):
        part = np.s_[:, first : first + 1000]
        some, other = fastbn.batch_norm(x[part])
        np.testing.assert_array_equal(y[part], some)
        for actual, wanted in zip(
            (dx[part], dgamma[first : first + 1000], dbeta[first : first + 1000]),
            fastbn.batch_norm_backward(x[part], other),
            strict=True,
        ):
            np.testing.assert_array_equal(actual, wanted)
