"""Recycled memory: used again only when nobody sees it any more, and no more of it than allowed."""

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import python

import fastbn
from fastbn.runtime import memory

SHAPE = (2, 3, 1_500_000)  # 36 MB of float32; large enough to be recycled
SIZE = 9 << 22  # of its block: the result, its alignment, and up to an eighth more
X = np.zeros(SHAPE, np.float32)  # never written, so hardly any memory


@pytest.fixture(autouse=True)
def limit():
    """Begin and end with nothing kept and the limit of 1 GiB."""
    before = fastbn.set_recycling(0)
    fastbn.set_recycling(1 << 30)
    yield
    fastbn.set_recycling(0)
    fastbn.set_recycling(before)


def large(value=0, x=X):
    return fastbn.batch_norm_inference(x, np.zeros(3), np.ones(3), None, np.full(3, value))


def address(array):
    return array.ctypes.data


def test_a_large_result_lies_where_a_dead_one_lay():
    y = large(1)
    where = address(y)
    del y
    assert memory.kept_bytes() == SIZE
    y = large(2)
    assert address(y) == where
    assert memory.kept_bytes() == 0
    assert (y == 2).all()


VIEWS = {
    "slice": lambda y: y[1:, :, ::2],
    "transposed": lambda y: y.T,
    "other dtype": lambda y: y.view(np.uint8),
    "reshaped": np.ravel,
    "view of a view": lambda y: y[0][1][5:],
    "memoryview": memoryview,
}


@pytest.mark.parametrize("kind", VIEWS)
def test_memory_is_not_used_again_while_a_view_of_it_lives(kind):
    y = large(1)
    where = address(y)
    view = VIEWS[kind](y)
    before = np.array(view)
    del y
    other = large(2)
    assert address(other) != where
    np.testing.assert_array_equal(np.array(view), before)
    del view
    assert address(large(3)) == where


def test_every_large_result_is_recycled(rng):
    x = rng.standard_normal(SHAPE, np.float32)
    y, cache = fastbn.batch_norm(x)
    dx, *_ = fastbn.batch_norm_backward(x, cache)
    places = {address(y), address(dx)}
    assert len(places) == 2
    del y, dx, cache
    y, cache = fastbn.batch_norm(x)
    dx, *_ = fastbn.batch_norm_backward(x, cache)
    assert {address(y), address(dx)} == places


def test_recycled_memory_changes_no_bit(rng):
    x = rng.standard_normal(SHAPE, np.float32)
    wanted, cache = fastbn.batch_norm(x, out=np.empty_like(x))
    x_again, cache = fastbn.batch_norm(x)
    gradients = fastbn.batch_norm_backward(x, cache, out=np.empty_like(x))
    x_again[...] = np.nan
    where = address(x_again)
    del x_again
    y, cache = fastbn.batch_norm(x)
    assert address(y) == where
    np.testing.assert_array_equal(y, wanted)
    y[...] = np.nan
    del y
    dx, *_ = fastbn.batch_norm_backward(x, cache)
    assert address(dx) == where
    np.testing.assert_array_equal(dx, gradients[0])


def test_large_results_are_plain_aligned_arrays_laid_out_as_x():
    for x in (
        X, X.astype(">f4"), np.zeros(SHAPE[::-1], np.float32).T, np.zeros(SHAPE, np.float64),
        np.zeros((2, 1_500_000, 3), np.float32).transpose(0, 2, 1), X[:, :, None, :],
    ):  # fmt: skip
        y = large(1, x)
        assert type(y) is np.ndarray
        assert y.dtype == x.dtype.newbyteorder("=")
        assert y.shape == x.shape
        assert all(
            a == b
            for n, a, b in zip(x.shape, np.empty_like(x).strides, y.strides, strict=True)
            if n > 1
        )
        assert address(y) % 64 == 0
        assert y.flags.writeable
        assert (y == 1).all()


def test_memory_of_one_dtype_serves_another():
    y = large()
    where = address(y)
    del y
    y = large(1, np.zeros((1, 3, 1_500_000)))  # of float64: the same number of bytes
    assert address(y) == where
    assert (y == 1).all()


def test_a_block_much_too_large_waits_for_a_larger_result():
    y = large(0, np.zeros((3, 3, 1_500_000), np.float32))
    where = address(y)
    del y
    assert address(large()) != where
    small = large(0, np.zeros((1, 3, 100), np.float32))
    assert address(small) != where


def test_small_results_are_left_to_malloc():
    y = large(0, np.zeros((1, 3, 2_000), np.float32))
    del y
    assert memory.kept_bytes() == 0


def test_zero_gives_everything_back_and_switches_off():
    alive = large(1)
    large()
    assert memory.kept_bytes() == SIZE
    assert fastbn.set_recycling(0) == 1 << 30
    assert memory.kept_bytes() == 0
    large()
    assert memory.kept_bytes() == 0
    assert (alive == 1).all()
    del alive
    assert memory.kept_bytes() == 0
    assert fastbn.set_recycling(1 << 30) == 0


def test_the_limit_is_kept_and_the_oldest_goes_first():
    fastbn.set_recycling(2 * SIZE)
    arrays = [large() for _ in range(4)]
    places = [address(y) for y in arrays]
    while arrays:
        del arrays[0]
        assert memory.kept_bytes() <= 2 * SIZE
    assert memory.kept_bytes() == 2 * SIZE
    fastbn.set_recycling(2 * SIZE - 1)
    assert memory.kept_bytes() == SIZE
    assert address(large()) == places[-1]
    fastbn.set_recycling(SIZE - 1)
    assert memory.kept_bytes() == 0


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1, ValueError, "max_bytes: expected an integer >= 0, got -1"),
        (1e9, TypeError, "max_bytes: expected an integer, got float"),
        ("1", TypeError, "max_bytes: expected an integer, got str"),
        (None, TypeError, "max_bytes: expected an integer, got NoneType"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_bad_limit_is_refused_and_changes_nothing(limit, error, message):
    fastbn.set_recycling(5)
    with pytest.raises(error, match=f"^{message}$"):
        fastbn.set_recycling(limit)
    assert fastbn.set_recycling(1 << 30) == 5


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, np.array, "pickle"], ids=str)
def test_a_copy_is_independent(duplicate):
    y = large(1)
    twin = pickle.loads(pickle.dumps(y, 5)) if duplicate == "pickle" else duplicate(y)
    y[...] = 2
    del y
    large(3)
    assert (twin == 1).all()


def test_threads_never_get_the_same_memory():
    together = threading.Barrier(6)

    def call(value):
        for _ in range(4):
            y = large(value)
            together.wait(60)  # all results live now
            assert (y == value).all()
            together.wait(60)
            del y
        return True

    with ThreadPoolExecutor(6) as callers:
        assert all(callers.map(call, range(6)))
    assert memory.kept_bytes() <= 6 * SIZE


def test_memory_comes_back_from_arrays_in_cycles_whenever_they_are_collected():
    # The collector may run anywhere, also within the very functions that take and keep blocks.
    enabled = gc.isenabled()
    threshold = gc.get_threshold()
    fastbn.set_recycling(2 * SIZE)
    try:
        gc.set_threshold(1, 1, 1)
        for i in range(24):
            # 36, 38 and 40 MB: a block is often near enough to serve, and often a little too small.
            x = np.zeros((2, 3, 1_500_000 + 90_000 * (i % 3)), np.float32)
            cycle = [large(i, x)]
            assert cycle[0][0, 0, -1] == i
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*threshold)
        if not enabled:
            gc.disable()
    gc.collect()
    assert 0 < memory.kept_bytes() <= 2 * SIZE


def test_a_result_is_not_resized():
    with pytest.raises(ValueError, match="does not own its data"):
        large().resize(3)


@pytest.mark.parametrize(("bytes_granted", "expected"), [(1 << 40, 1 << 30), (800, 100)])
def test_the_limit_is_a_share_of_the_memory(bytes_granted, expected):
    code = (
        f"import os; os.sysconf = lambda name: 1 if name == 'SC_PAGE_SIZE' else {bytes_granted}\n"
        "import fastbn; print(fastbn.set_recycling(0))"
    )
    assert python(code).stdout.strip() == str(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_result_that_does_not_fit_is_a_memory_error():
    code = """
import resource
import numpy as np, fastbn
x = np.zeros((1 << 26, 4), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + x.nbytes // 2, -1))
for _ in range(3):
    try:
        fastbn.batch_norm_inference(x, np.zeros(4), np.ones(4))
    except MemoryError:
        print("refused")
print(fastbn.batch_norm(x[:20_000])[0].shape)
"""
    result = python(code, FASTBN_NUM_THREADS="1")
    assert result.stdout.split("\n")[:4] == ["refused"] * 3 + ["(20000, 4)"], result.stderr


def test_no_block_is_kept_by_anything_but_its_arrays():
    y = large()
    gone = weakref.ref(y)
    del y
    assert gone() is None


EXIT = """
import threading, time
import numpy as np, fastbn
x = np.zeros((2, 3, 1_500_000), np.float32)
y, cache = fastbn.batch_norm(x)
"""


@pytest.mark.parametrize(
    "code",
    [
        "",
        "cycle = [y]; cycle.append(cycle); del y",
        "np.kept_by_a_module = y",
        "fastbn.kept_by_us = y; del y",
        "dx, *_ = fastbn.batch_norm_backward(y, cache); view = dx[0, 0]; del dx",
        "def keep(y=y): pass\nthreading.Thread(target=lambda: keep(time.sleep(9)), daemon=True)"
        ".start()",
        "import atexit; atexit.register(fastbn.batch_norm, x)",
        "import sys; sys.modules.pop('fastbn.runtime.memory')",
    ],
)
def test_exit_with_recycled_memory_is_silent(code):
    result = python(EXIT + code)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_a_thread_takes_a_block_leaves_the_child_able_to():
    result = python("""
import os, signal, threading, warnings
import numpy as np, fastbn
warnings.simplefilter("ignore", DeprecationWarning)
x = np.zeros((2, 3, 1_500_000), np.float32)
stop = threading.Event()
def take():
    while not stop.is_set():
        fastbn.batch_norm(x)
thread = threading.Thread(target=take)
thread.start()
for _ in range(5):
    child = os.fork()
    if not child:
        signal.alarm(20)
        fastbn.batch_norm(x)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child hung"
stop.set()
""")
    assert (result.returncode, result.stderr) == (0, "")
