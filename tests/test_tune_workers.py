"""Workers in processes of their own: threads, deaths, several commands on one storage."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from tune_objectives import (
    Ending,
    Logged,
    begun,
    content,
    killed,
    quiet,
    start,
    unspeakable,
    wait_until,
    wrong,
    wrong_at_length,
)

import fastbn
from fastbn.demo import DemoError
from fastbn.tune.storage import opened

optuna = pytest.importorskip("optuna")


def environment():
    """Return an environment in which another Python finds what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_workers_share_the_threads_and_draw_what_one_would(tmp_path):
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(5)
    variables = dict(os.environ)
    try:
        result = quiet(Logged(str(tmp_path / "log"), processes=2), trials=14, workers=2)
    finally:
        fastbn.set_num_threads(before)
    assert dict(os.environ) == variables
    assert content(result) == content(quiet(trials=14))
    lines = begun(tmp_path / "log")
    assert len(lines) == len({line[3] for line in lines}) == 14
    assert len({line[0] for line in lines}) == len({r.worker for r in result.trials}) == 2
    assert {tuple(line[1:3]) for line in lines} == {("2", "2")}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_worker_costs_time_only(tmp_path):
    log = tmp_path / "log"
    victims = []

    def kill():
        wait_until(lambda: len({line[0] for line in begun(log)}) == 2)
        victims.append(begun(log)[-1])
        os.kill(int(victims[0][0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    # No trial ends before the third worker has begun one, which comes when another was killed.
    objective = Logged(str(log), processes=3)
    result = quiet(objective, trials=12, workers=2, storage=str(tmp_path / "journal"))
    killer.join()
    assert content(result) == content(quiet(trials=12))
    times = Counter(line[3] for line in begun(log))
    [[_, _, _, lr]] = victims
    assert times.pop(lr) == 2
    assert set(times.values()) == {1}
    assert len(times) == 11
    assert sorted(r.attempts for r in result.trials) == [1] * 11 + [2]
    assert len({line[0] for line in begun(log)}) == 3  # it was replaced


def test_a_long_error_of_the_objective_in_a_worker():
    with pytest.raises(DemoError, match="objective: ArithmeticError: xxx") as caught:
        quiet(wrong_at_length, trials=6, workers=2)
    assert str(caught.value).count("x") == 100_000


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_all_workers_die_of_one_trial():
    result = quiet(killed, start=start, trials=2, rounds=1, workers=2)
    assert {r.state for r in result.trials if r.params.get("units") != 5} == {"complete"}
    lost = [r for r in result.trials if r.params.get("units") == 5]
    assert lost
    assert {(r.state, r.attempts, r.value) for r in lost} == {("failed", 3, None)}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize(
    ("ways", "reason"),
    [
        (("exits well", "crashes", "exits"), "SystemExit: no GPU"),
        (("exits", "interrupts", "ends at once"), "exit code 0"),
        (("ends at once", "is told to end", "crashes"), "SIGSEGV"),
        (("crashes", "exits", "is told to end"), "SIGTERM"),
        (("interrupts",), "KeyboardInterrupt"),
    ],
)
def test_what_ends_a_worker_counts_against_its_trial(ways, reason, tmp_path):
    objective = Ending(str(tmp_path / "log"), ways)
    with pytest.raises(DemoError) as caught:
        quiet(objective, trials=1, workers=2)
    assert str(caught.value) == (
        "objective: trials given up: 1, each after 3 of its workers were ended, at last"
        f" by {reason}; no other gave a finite number"
    )
    assert len(begun(tmp_path / "log")) == 3


def test_a_search_all_of_whose_workers_end_is_over_soon(tmp_path):
    objective = Ending(str(tmp_path / "log"), ("exits",))
    with pytest.raises(DemoError, match=r"objective: trials given up: 3, .*: no GPU"):
        quiet(objective, trials=100, workers=2)
    # Three trials, three times, and what the other worker has begun meanwhile; not 300.
    assert len(begun(tmp_path / "log")) <= 30


def test_an_error_that_cannot_say_what_is_wrong():
    with pytest.raises(DemoError) as caught:
        quiet(unspeakable, trials=6, workers=2)
    assert str(caught.value).startswith("objective: UnspeakableError: ")
    assert "in unspeakable\n" in caught.value.__notes__[0]


def test_an_error_of_the_objective_in_a_worker():
    with pytest.raises(DemoError, match=r"objective: ArithmeticError: no value for \d") as caught:
        quiet(wrong, trials=6, workers=2)
    [trace] = caught.value.__notes__
    assert "tune_objectives.py" in trace
    assert "rounds.py" not in trace
    assert re.search(r"\nraised by the objective with \{.*'lr': .*\}\n", trace)


PARENT = """
import sys
from tune_objectives import Logged, space
from fastbn.tune import search
log, storage = sys.argv[1:]
if __name__ == "__main__":
    search(Logged(log, processes=3), space, workers=2, storage=storage, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_workers_end_in_order_when_their_parent_is_killed(tmp_path):
    log, storage = tmp_path / "log", str(tmp_path / "journal")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, log, storage], env=environment())
    with parent:
        wait_until(lambda: len(begun(log)) == 2)
        parent.kill()
    with opened(storage) as shared:
        study = optuna.load_study(storage=shared, study_name="study 1")

        def claimed():  # without what a worker gave back because another one was faster
            return [t for t in study.trials if "dropped" not in t.user_attrs]

        wait_until(lambda: [t.state.name for t in claimed()] == ["FAIL", "FAIL"])
        assert all(t.user_attrs["released"] for t in claimed())


COMMAND = """
import sys
from tune_objectives import Logged, space
from fastbn.tune import search
log, storage = sys.argv[1:]
result = search(Logged(log, processes=2), space, trials=16, storage=storage, progress=False)
print(*(r.value for r in result.trials))
"""


@contextmanager
def journal(folder):
    yield str(folder / "journal")


@contextmanager
def sqlite(folder):
    yield f"sqlite:///{folder / 'study.db'}"


@contextmanager
def grpc(folder):
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server  # run_grpc_proxy_server never ends

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = make_server(optuna.storages.InMemoryStorage(), "localhost", port)
    server.start()
    try:
        yield f"grpc://localhost:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def postgresql(folder):
    pytest.importorskip("psycopg")
    on_debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    path = os.pathsep.join([os.environ["PATH"], *map(str, reversed(on_debian))])
    initdb, server = (shutil.which(name, path=path) for name in ("initdb", "postgres"))
    if not initdb or not server:
        pytest.skip("there is no PostgreSQL server (Debian: apt-get install postgresql)")
    user = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to run as root
    # Not in pytest's folder: the name of a socket is short, and another user has to get there.
    with tempfile.TemporaryDirectory(prefix="fastbn") as name:
        if user:
            shutil.chown(name, "nobody")
        quiet = {"stdout": subprocess.DEVNULL, "cwd": name, **user}
        data = str(Path(name, "data"))
        subprocess.run([initdb, "-D", data, "-U", "tune", "-A", "trust", "--no-sync"],
                       check=True, stderr=subprocess.DEVNULL, **quiet)  # fmt: skip
        options = ["-D", data, "-k", name, "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen([server, *options], stderr=subprocess.PIPE, text=True, **quiet)
        with process:
            try:
                for line in process.stderr:
                    if "ready to accept connections" in line:
                        break
                else:
                    pytest.fail("the PostgreSQL server did not start")
                # The server must never wait for somebody to read what it writes.
                threading.Thread(target=process.stderr.read).start()
                yield f"postgresql://tune@/postgres?host={name}"
            finally:
                process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("storage", [journal, sqlite, grpc, postgresql])
def test_two_commands_share_a_study(storage, tmp_path):
    log = tmp_path / "log"
    with storage(tmp_path) as url:
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, log, url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            for _ in range(2)
        ]
        told = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    expected = [r.value for r in quiet(trials=16).trials]
    assert [[float(word) for word in out.split()] for out, _ in told] == [expected] * 2
    lines = begun(log)
    assert len(lines) == len({line[3] for line in lines}) == 16
    assert len({line[0] for line in lines}) == 2
