"""What only shows after a while: forks, many threads, interruptions. `pytest -m long` runs it."""

import sys

import pytest
from support import python

SETUP = """if True:
    import os, signal, sys, threading, time
    from pathlib import Path
    import numpy as np, fastbn
    rng = np.random.default_rng(0)
    small, large = (rng.standard_normal(shape, np.float32) for shape in [(6, 5, 7), (40, 64, 400)])
    fastbn.set_num_threads(3)
    def results(x):
        y, cache = fastbn.batch_norm(x, activation="relu")
        return b"".join(a.tobytes() for a in (y, *fastbn.batch_norm_backward(x, cache)))
    wanted = [results(small), results(large)]
    def right():
        return [results(small), results(large)] == wanted
    def mib():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]


def run(code, timeout):
    done = python(SETUP + code, timeout=timeout, PYTHONWARNINGS="ignore::DeprecationWarning")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_thousand_forks_during_use():
    out = run(
        """
    ended = threading.Event()
    def use():
        while not ended.is_set():
            assert right()
    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    failed = 0
    for _ in range(1000):
        child = os.fork()
        if child == 0:
            os._exit(0 if right() else 1)
        failed += os.waitpid(child, 0)[1] != 0
    ended.set()
    for user in users:
        user.join()
    print(failed)
""",
        timeout=600,
    )
    assert out.split() == ["0"]


def test_a_hundred_threads_call_for_a_minute_in_flat_memory():
    out = run(
        """
    end, wrong, calls = time.monotonic() + 60, [], [0] * 100
    def use(i):
        while time.monotonic() < end:
            if not right():
                wrong.append(i)
            calls[i] += 4
    threads = [threading.Thread(target=use, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    time.sleep(20)
    early = mib()
    for thread in threads:
        thread.join(timeout=30)
    print(len(wrong), sum(thread.is_alive() for thread in threads), min(calls) > 0)
    print(f"{sum(calls)} calls, {early:.0f} MiB after 20 s, {mib():.0f} MiB after 60 s")
    assert mib() < early + 100
""",
        timeout=150,
    )
    print(out)
    assert out.split()[:3] == ["0", "0", "True"]


def test_ctrl_c_in_the_middle_of_a_thousand_calls():
    out = run(
        """
    layer = fastbn.BatchNorm(64)
    layer(large)
    interrupted = calls = 0
    early = None
    while interrupted < 1000:
        # From another process' point of view: at any moment of the calls that follow.
        timer = threading.Timer(rng.random() * 0.02, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                calls += 1
                x = large if calls % 3 else large.copy()
                layer(x)
                layer.backward(x)
                fastbn.batch_norm(x, out=x if calls % 3 == 0 else None)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        if interrupted == 100:
            early = mib()
    assert all(np.isfinite(a).all() for a in (layer.running_mean, layer.running_var, layer.gamma))
    assert right()
    assert mib() < early + 100, (early, mib())
    print(interrupted, calls > 1000)
""",
        timeout=400,
    )
    assert out.split() == ["1000", "True"]
