"""The cache as an object: its copies, and what moves running statistics by it."""

import copy
import pickle
import re

import numpy as np
import pytest
from support import BFLOAT16

import fastbn
from fastbn import functional

# Views of other memory orders: pickle would bring back each as C-contiguous.
VIEWS = {
    "NCHW": lambda x: x,
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "Fortran": np.asfortranarray,
    "backwards": lambda x: x[::-1],
}
FORMS = {
    "plain": {},
    "fused": {"activation": "relu", "residual": True},
    "masked": {"mask": True},
    "groups": {"virtual_batch_size": 2},
}


def forward(rng, view, form, dtype=np.float32):
    x = VIEWS[view](rng.standard_normal((4, 3, 5, 2)).astype(dtype))
    options = dict(FORMS[form])
    if "residual" in options:
        options["residual"] = rng.standard_normal(x.shape).astype(dtype)
    if "mask" in options:
        options["mask"] = rng.random((4, 5, 2)) < 0.7
    gamma, beta = rng.standard_normal((2, 3)).astype(np.float32)
    return x, fastbn.batch_norm(x, gamma, beta, **options)[1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("view", VIEWS)
def test_a_cache_is_not_pickled(rng, view, protocol):
    _, cache = forward(rng, view, "fused")
    message = "cache: expected to stay in its process, got pickled, which loses how x lies in"
    with pytest.raises(TypeError, match=message):
        pickle.dumps(cache, protocol)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_a_deep_copy_goes_back_by_itself(rng, view, form, dtype):
    if dtype is None:
        pytest.skip("bfloat16 needs ml_dtypes, which is not installed")
    x, cache = forward(rng, view, form, dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    wanted = fastbn.batch_norm_backward(dy, cache)
    twin = copy.deepcopy(cache)
    np.testing.assert_array_equal(twin.mean, cache.mean)
    cache.mean[...] = cache.var[...] = 7
    x[...] = 7
    for actual, right in zip(fastbn.batch_norm_backward(dy, twin), wanted, strict=True):
        np.testing.assert_array_equal(actual, right)
        assert actual.dtype == right.dtype
        assert actual.strides == right.strides


def test_a_copy_knows_that_x_is_overwritten(rng):
    x, cache = forward(rng, "NCHW", "plain")
    twin = copy.copy(cache)
    dx, *_ = fastbn.batch_norm_backward(x, twin)
    np.testing.assert_array_equal(fastbn.batch_norm_backward(x.copy(), cache, out=x)[0], dx)
    with pytest.raises(ValueError, match="cache: x is needed for the gradients"):
        fastbn.batch_norm_backward(x, twin)


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda a: a.setflags(write=False) or a, "float64, shape (3,), writeable: False, contig"),
        (lambda a: a.astype(np.float16), "float16, shape (3,), writeable: True, contiguous: True"),
        (lambda a: np.repeat(a, 2)[::2], "shape (3,), writeable: True, contiguous: False"),
        (lambda a: np.append(a, 1), "float64, shape (4,), writeable: True, contiguous: True"),
    ],
)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_cannot_be_written_are_told_why(rng, name, spoil, got):
    _, cache = forward(rng, "NCHW", "plain")
    arrays = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    arrays[name] = spoil(arrays[name])
    before = copy.deepcopy(arrays)
    words = f"{name}: expected a writeable, contiguous array of float64 or float32, 3 value(s), "
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        functional.update_running(cache, *arrays.values(), 0.1)
    assert got in str(error.value)
    for each, values in before.items():
        np.testing.assert_array_equal(arrays[each], values)
