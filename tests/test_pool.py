"""The number of threads, where it comes from, and what a pool of threads can do wrong."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import numpy as np
import pytest
from support import ENOUGH, python

import fastbn
from fastbn.runtime import limits, pool

posix = pytest.mark.skipif(os.name != "posix", reason="fork and signals are of POSIX")


@pytest.fixture(autouse=True)
def number_of_threads():
    before = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(before)


# ------------------------------------------------------------------------------------- the number


@pytest.mark.parametrize("n", [1, 2, 1024, np.int64(3)])
def test_what_is_set_is_what_one_gets(n):
    fastbn.set_num_threads(n)
    assert fastbn.get_num_threads() == n
    assert type(fastbn.get_num_threads()) is int


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n: expected an integer from 1 to 1024, got 0"),
        (-1, ValueError, "n: expected an integer from 1 to 1024, got -1"),
        (1025, ValueError, "n: expected an integer from 1 to 1024, got 1025"),
        (2**70, ValueError, "n: expected an integer from 1 to 1024, got 1180591620717411303424"),
        (2.0, TypeError, "n: expected an integer, got float"),
        ("2", TypeError, "n: expected an integer, got str"),
        (None, TypeError, "n: expected an integer, got NoneType"),
    ],
)
def test_a_bad_number_is_refused_and_changes_nothing(n, error, message):
    fastbn.set_num_threads(3)
    with pytest.raises(error, match=f"^{message}$"):
        fastbn.set_num_threads(n)
    assert fastbn.get_num_threads() == 3


SHOW = "import fastbn; print(fastbn.get_num_threads())"


@pytest.mark.parametrize(
    ("ours", "openmp", "expected"),
    [
        ("3", None, 3), (" 3 ", None, 3), ("1024", None, 1024), ("3", "2", 3),
        (None, "2,1", 2), (None, " 5 ", 5), (None, "4 , 2", 4),
    ],
)  # fmt: skip
def test_the_environment_says_how_many(ours, openmp, expected):
    result = python(SHOW, FASTBN_NUM_THREADS=ours, OMP_NUM_THREADS=openmp)
    assert result.stdout.strip() == str(expected)


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "two", "2,1", "1025", "99999"])
def test_a_bad_fastbn_num_threads_is_an_import_error(value):
    result = python(SHOW, FASTBN_NUM_THREADS=value)
    assert result.returncode != 0
    wanted = f"FASTBN_NUM_THREADS: expected an integer from 1 to 1024, got {value!r}"
    assert f"ImportError: {wanted}" in result.stderr


@pytest.mark.parametrize("value", ["", "0", "x", "2x", "-3", "99999", ",2", "2 1"])
def test_a_malformed_omp_num_threads_is_ignored(value, monkeypatch):
    monkeypatch.delenv("FASTBN_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    wanted = pool.default_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert pool.default_num_threads() == wanted


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_limits_the_number():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + SHOW
    result = python(code, FASTBN_NUM_THREADS=None, OMP_NUM_THREADS=None)
    assert result.stdout.strip() == "1", result.stderr


# --------------------------------------------------------------------------------- control groups


def granted(tmp_path, membership, files):
    """Return what a control group grants; files maps paths below the root to what they say."""
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "membership").write_text(membership, encoding="utf-8")
    return limits.of_control_groups("cpu", limits._cpus, tmp_path / "root", tmp_path / "membership")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"a/b/cpu.max": "max 100000\n"}, None),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ({"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "400000 100000\n"}, 4),  # in a container: the root is its own group
        ({"a/c/cpu.max": "100000 100000\n"}, None),  # a sibling's
        ({"a/b/cpu.max": ""}, None),
        ({"a/b/cpu.max": "many 100000\n"}, None),
        ({"a/b/cpu.max": "100000 0\n"}, None),
        ({"a/b/cpu.max": "100000\n", "a/cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_quotas_of_version_2(tmp_path, files, expected):
    assert granted(tmp_path, "0::/a/b\n", files) == expected


@pytest.mark.parametrize(
    ("quota", "outer_quota", "expected"),
    [
        ("250000", None, 2.5), ("-1", None, None), ("250000", "100000", 1), ("-1", "300000", 3),
        ("", "100000", 1), ("x", None, None),
    ],
)  # fmt: skip
def test_quotas_of_version_1(tmp_path, quota, outer_quota, expected):
    files = {"cpu/a/b/cpu.cfs_quota_us": quota, "cpu/a/b/cpu.cfs_period_us": "100000\n"}
    if outer_quota:
        files["cpu/a/cpu.cfs_quota_us"] = outer_quota
        files["cpu/a/cpu.cfs_period_us"] = "100000\n"
    membership = "12:memory:/z\n4:cpu,cpuacct:/a/b\n1:name=systemd:/y\n"
    assert granted(tmp_path, membership, files) == expected


def test_a_period_that_is_missing_or_zero_is_no_limit(tmp_path):
    assert granted(tmp_path, "4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000"}) is None
    files = {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "0"}
    assert granted(tmp_path, "4:cpu:/a\n", files) is None


@pytest.mark.parametrize("membership", ["", "nonsense\n", "0::\n", "0::/a:b\n", "0::/ü\n"])
def test_an_odd_membership_is_no_error(tmp_path, membership):
    assert granted(tmp_path, membership, {}) is None


def test_a_membership_that_is_no_text_is_no_error(tmp_path):
    (tmp_path / "membership").write_bytes(b"0::/\xff\n")  # names of directories are any bytes
    assert limits.of_control_groups("cpu", limits._cpus, tmp_path, tmp_path / "membership") is None


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a\n", {"a/memory.max": "1000000\n", "memory.max": "max\n"}, 1_000_000),
        ("3:memory:/a\n", {"memory/a/memory.limit_in_bytes": "2000000\n"}, 2_000_000),
        ("3:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(1 << 63)}, None),
        ("0::/a\n", {}, None),
    ],
)
def test_memory_is_that_of_the_machine_or_of_the_control_group(
    tmp_path, membership, files, expected
):
    granted(tmp_path, membership, files)
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = limits.usable_memory(tmp_path / "root", tmp_path / "membership")
    assert found == (expected or of_machine)


def test_a_system_without_control_groups_has_no_limit(tmp_path):
    where = (tmp_path / "root", tmp_path / "missing")
    assert limits.of_control_groups("cpu", limits._cpus, *where) is None


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.0, 1), (1.5, 2), (1e9, None)])
def test_a_quota_is_rounded_up_and_never_more_than_the_cpus(monkeypatch, quota, expected):
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity on this system")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(limits, "of_control_groups", lambda *_: quota)
    assert pool.default_num_threads() == (expected or 8)


# ---------------------------------------------------------------------------------- threadpoolctl


def test_threadpoolctl_sets_the_number():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    fastbn.set_num_threads(3)
    with threadpoolctl.threadpool_limits(limits=1):
        assert fastbn.get_num_threads() == 1
    assert fastbn.get_num_threads() == 3
    with threadpoolctl.threadpool_limits(limits=2, user_api="fastbn"):
        assert fastbn.get_num_threads() == 2
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        assert fastbn.get_num_threads() == 3
    [info] = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "fastbn"]
    assert info["num_threads"] == 3
    assert info["version"] == fastbn.__version__


def test_a_threadpoolctl_that_is_too_old_is_left_alone(tmp_path):
    (tmp_path / "threadpoolctl.py").write_text(
        "# without LibController, as before 3.2\n", encoding="utf-8"
    )
    result = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + SHOW)
    assert result.returncode == 0, result.stderr


def test_a_fault_beside_threadpoolctl_is_not_hidden(tmp_path):
    broken = "LibController = object\ndef register(controller): controller.of_no_such_name"
    (tmp_path / "threadpoolctl.py").write_text(broken, encoding="utf-8")
    result = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + SHOW)
    assert "AttributeError: type object 'FastbnController' has no attribute" in result.stderr


# -------------------------------------------------------------------------------- several callers

SIZES = [(4, 3, 5), (64, 100, 1), (16, 64, 400), (60_000, 7, 1), (2, 3, 90_000), (40, 500, 49)]


def batch(shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def results(x):
    y, cache = fastbn.batch_norm(x)
    return [a.tobytes() for a in (y, *fastbn.batch_norm_backward(x, cache))]


def test_concurrent_callers_get_the_bits_of_one(threads):
    assert batch(SIZES[-1]).nbytes * 2 > ENOUGH
    batches = [batch(shape) for shape in SIZES]
    fastbn.set_num_threads(1)
    wanted = [results(x) for x in batches]
    fastbn.set_num_threads(threads)
    start = threading.Barrier(8)

    def call(first):
        start.wait(60)
        return all(
            results(batches[i % len(SIZES)]) == wanted[i % len(SIZES)]
            for i in range(first, first + 12)
        )

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, range(8)))


def test_the_number_may_change_during_calls():
    x = batch((16, 64, 400))
    wanted = results(x)
    done = threading.Event()

    def change():
        n = 0
        while not done.is_set():
            n = n % 7 + 1
            fastbn.set_num_threads(n)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(3) as callers:
            assert all(callers.map(lambda _: results(x) == wanted, range(60)))
    finally:
        done.set()
        changing.join()


def test_layers_of_several_threads_and_hooks_that_call_again_change_no_bit():
    x = batch((16, 64, 400))

    def train(n):
        seen = []
        layer = fastbn.BatchNorm(64)
        inner = fastbn.BatchNorm(64)
        layer.register_grad_hook(lambda _: seen.append(inner.backward(inner(x)).tobytes()))
        gradients = [layer.backward(layer(x)).tobytes() for _ in range(4)]
        state = {**layer.state_dict(), **layer.grads}
        return seen, gradients, {name: value.tobytes() for name, value in state.items()}

    fastbn.set_num_threads(1)
    wanted = train(0)
    fastbn.set_num_threads(3)
    with ThreadPoolExecutor(4) as callers:
        assert all(result == wanted for result in callers.map(train, range(8)))


# ------------------------------------------------------------- other interpreters: fork, exit, ^C

PRELUDE = """
import os, signal, sys, threading, time, warnings
import numpy as np
import fastbn

warnings.simplefilter("ignore", DeprecationWarning)  # of fork, in a process that has threads

def batch(shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)

X = batch((16, 64, 400))

def bits():
    y, cache = fastbn.batch_norm(X)
    return [a.tobytes() for a in (y, *fastbn.batch_norm_backward(X, cache))]

def check():
    assert bits() == WANTED

def in_child(work):
    child = os.fork()
    if not child:
        signal.alarm(30)  # a child that hangs would outlive the test
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"

def call_for_ever():
    while True:
        fastbn.batch_norm(X)

fastbn.set_num_threads(1)
WANTED = bits()
fastbn.set_num_threads(3)
"""


def run(code, **environment):
    """Run code after PRELUDE: it must end by itself, say nothing, and return 0."""
    result = python(PRELUDE + dedent(code), **environment)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@posix
def test_parent_child_and_grandchild_of_a_fork_compute():
    run("""
        check()

        def work():
            check()
            in_child(check)
            check()

        in_child(work)
        check()
        time.sleep(0.05)  # until the workers sleep
        in_child(work)
        check()
    """)


@posix
def test_a_fork_before_the_first_call_is_no_different():
    run("in_child(check); check()")


@posix
def test_a_fork_while_another_thread_is_inside_a_call():
    run("""
        threads = [threading.Thread(target=call_for_ever, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            in_child(check)
            check()
        sys.stdout.flush()
        os._exit(0)
    """)


@posix
def test_workers_of_multiprocessing_compute():
    run("""
        import multiprocessing

        def job(_):
            signal.alarm(30)
            return bits() == WANTED

        check()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert all(pool.map(job, range(8)))
        check()
    """)


@pytest.mark.parametrize("pause", [0, 0.00005, 0.05])
def test_exit_with_workers_busy_yielding_or_asleep_is_silent(pause):
    for _ in range(3):
        run(f"check(); time.sleep({pause})")


def test_exit_while_a_daemon_thread_is_inside_a_call_is_silent():
    code = """
        for _ in range(2):
            threading.Thread(target=call_for_ever, daemon=True).start()
        time.sleep(0.1)
    """
    for _ in range(3):
        assert run(code) == ""


@posix
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_ctrl_c_during_a_call_arrives_and_later_calls_compute(threads):
    run(f"""
        fastbn.set_num_threads({threads})
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the background may ignore it
        big = batch((16, 64, 8000))
        for _ in range(5):
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                while True:
                    fastbn.batch_norm(big)
            except KeyboardInterrupt:
                timer.join()
                check()
            else:
                raise SystemExit("not interrupted")
    """)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_workers_begin_with_the_first_large_call_and_are_no_more_than_needed():
    run("""
        def workers():
            return len(os.listdir("/proc/self/task")) - before

        before = len(os.listdir("/proc/self/task"))
        fastbn.batch_norm(X[:1])
        assert workers() == 0
        fastbn.set_num_threads(1)
        check()
        assert workers() == 0
        fastbn.set_num_threads(4)
        check()
        check()
        fastbn.set_num_threads(2)
        check()
        assert workers() == 3
    """)


@posix
def test_a_system_that_has_no_more_threads_is_no_error():
    output = run("""
        import resource

        if os.geteuid() == 0:  # no limit holds for root, but it may be nobody
            os.setuid(65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            pass
        else:
            print("no limit")
        check()
        check()
    """)
    if output:
        pytest.skip("this system does not hold a process to its limit of threads")


def test_threads_may_go_back_through_one_cache_while_one_overwrites_x(rng):
    x = rng.standard_normal((64, 32, 16, 16), dtype=np.float32)
    dy, refused = 0.5 * x, []

    def go_back(cache, out):
        try:
            fastbn.batch_norm_backward(dy, cache, out=out)
        except ValueError as error:  # the other one was first
            refused.append(str(error))

    for _ in range(50):
        overwritten = x.copy()
        _, cache = fastbn.batch_norm(overwritten)
        threads = [threading.Thread(target=go_back, args=(cache, overwritten)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all("out= has overwritten it" in each for each in refused)
