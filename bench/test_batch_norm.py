"""fastbn, plain NumPy and the speed of copying, side by side; run with `pytest bench`.

One group a shape and direction. Results are checked against the reference before they are timed.
"""

import numpy as np
import plain_numpy
import pytest

import fastbn
from fastbn import reference

SHAPES = [
    (8, 4), (64, 64), (256, 1024), (100_000, 64),
    (32, 64, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14), (32, 2048, 7, 7),
]  # fmt: skip


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def case(request, benchmark):
    shape = request.param
    benchmark.group = f"{request.node.originalname} {shape}"
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), dtype=np.float32)
    gamma, beta = rng.standard_normal((2, shape[1]), dtype=np.float32)
    return x, dy, gamma, beta, np.empty_like(x)


def check(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("by", ["fastbn", "numpy", "copy"])
def test_forward(case, benchmark, by):
    x, _, gamma, beta, out = case
    if by == "copy":
        benchmark(np.copyto, out, x)
        return
    wanted, _ = reference.batch_norm(x, gamma, beta)
    if by == "fastbn":
        check(fastbn.batch_norm(x, gamma, beta)[0], wanted)
        benchmark(fastbn.batch_norm, x, gamma, beta, out=out)
    else:
        check(plain_numpy.forward(x, gamma, beta)[0], wanted)
        benchmark(plain_numpy.forward, x, gamma, beta)


@pytest.mark.parametrize("by", ["fastbn", "numpy", "add"])
def test_backward(case, benchmark, by):
    x, dy, gamma, beta, out = case
    if by == "add":
        benchmark(np.add, x, dy, out=out)
        return
    wanted, *_ = reference.batch_norm_backward(dy, reference.batch_norm(x, gamma, beta)[1])
    if by == "fastbn":
        _, cache = fastbn.batch_norm(x, gamma, beta)
        check(fastbn.batch_norm_backward(dy, cache)[0], wanted)
        benchmark(fastbn.batch_norm_backward, dy, cache, out=out)
    else:
        _, cache = plain_numpy.forward(x, gamma, beta)
        check(plain_numpy.backward(dy, cache)[0], wanted)
        benchmark(plain_numpy.backward, dy, cache)
