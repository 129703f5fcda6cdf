"""``fastbn tune`` under a full disk, a closed output, a read-only folder and SIGKILL.

Each time its files are whole, and the next run goes on.
"""

import csv
import ctypes
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_cli import command, run
from test_tune_command import OWN, own  # noqa: F401
from tune_objectives import wait_until

for module in ("optuna", "rich", "sklearn", "matplotlib"):
    pytest.importorskip(module)
resource = pytest.importorskip("resource")  # and the signals that Windows has not

# Workers that are gone count as dead soon.
HASTY = """
import sys
from fastbn.tune import rounds
rounds.GRACE, rounds.BEAT = 2.0, 0.2
from fastbn.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
SLOWLY = """
import time

def objective(params):
    with open("calls", "a") as file:
        print(params["lr"], file=file)
    time.sleep(0.15)
    return abs(params["lr"] - 0.01)
"""
TRIALS = 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "hasty.py").write_text(HASTY)
    (tmp_path / "slow.py").write_text(OWN.replace("def objective", "def other") + SLOWLY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(workers, **options):
    words = ["tune", "slow:objective", "--trials", TRIALS, "--workers", workers]
    process = command(*words)
    process["args"] = [sys.executable, "hasty.py", *process["args"][3:]]
    return process | {"stderr": subprocess.PIPE, "text": True, "start_new_session": True} | options


def check_the_next_run_goes_on(folder, workers, lost=0):
    finished = subprocess.run(**started(workers), stdout=subprocess.PIPE, check=False, timeout=170)
    assert finished.returncode == 0, finished.stderr
    assert f"{TRIALS} trials: {TRIALS} complete" in finished.stdout
    assert "Traceback" not in finished.stderr
    with (folder / "tune" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["params_lr"] for row in rows}) == TRIALS
    best = json.loads((folder / "tune" / "best.json").read_text())
    assert best["lr"] in {float(row["params_lr"]) for row in rows}
    for line in (folder / "tune" / "journal").read_text().splitlines():
        json.loads(line)
    assert count(folder) <= TRIALS + workers + lost  # only what was running began again


def count(folder):
    log = folder / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_after(folder, workers, moment):
    """Kill a run, with all of its workers, so many calls of the objective or seconds later."""
    with subprocess.Popen(**started(workers), stdout=subprocess.DEVNULL) as process:
        calls, seconds = moment
        wait_until(lambda: process.poll() is not None or count(folder) >= calls)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
    report = folder / "tune"
    if (report / "best.json").exists():
        json.loads((report / "best.json").read_text())


def test_sigkill(folder):
    kill_after(folder, 2, (4, 0.05))
    check_the_next_run_goes_on(folder, 2)


MOMENTS = [(0, 0.3), (0, 1.0), (1, 0.0), (1, 0.1), (2, 0.16), (4, 0.02), (5, 0.15), (7, 0.0),
           (8, 0.2), (8, 0.6)]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_sigkill_at_ten_moments(moment, workers, folder):
    kill_after(folder, workers, moment)
    check_the_next_run_goes_on(folder, workers)


def full(size):
    """Let files grow no further, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def check_a_full_disk(folder, workers, size):
    process = started(workers, preexec_fn=lambda: full(size), stdout=subprocess.PIPE)
    ended = subprocess.run(**process, check=False, timeout=170)
    assert ended.returncode == 2, ended
    *words, last = ended.stderr.splitlines()
    assert all(word.startswith("storage: ") for word in words)
    assert "File too large" in last
    journal = folder / "tune" / "journal"
    assert last.startswith((f"fastbn tune: error: storage: {journal}: cannot be used: ",
                            "fastbn tune: error: --out "))  # fmt: skip
    assert journal.stat().st_size <= size
    check_the_next_run_goes_on(folder, workers)


def test_a_full_disk(folder):
    check_a_full_disk(folder, 1, 4000)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [100, 700, 1000, 1500, 2000, 3000, 4500, 6000, 7777, 15000])
def test_a_full_disk_at_ten_moments(size, workers, folder):
    check_a_full_disk(folder, workers, size)


def check_a_closed_output(folder, workers, lines):
    with subprocess.Popen(**started(workers), stdout=subprocess.PIPE) as process:
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(170) == 141
    check_the_next_run_goes_on(folder, workers)


def test_a_closed_output(folder):
    check_a_closed_output(folder, 1, 2)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("lines", range(1, 11))
def test_a_closed_output_at_ten_moments(lines, workers, folder):
    check_a_closed_output(folder, workers, lines)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")  # noqa: PTH110
def test_a_full_output(folder):
    with open("/dev/full", "w") as out:  # noqa: PTH123
        ended = subprocess.run(**started(1, stdout=out), check=False, timeout=170)
    assert ended.returncode == 2
    assert ended.stderr == (
        "fastbn tune: error: [Errno 28] No space left on device: 'standard output'\n"
    )
    check_the_next_run_goes_on(folder, 1)


def without_the_rights_of_root():
    """Let the permissions of files hold for root as well."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.skipif(sys.platform != "linux", reason="root cannot be kept from writing")
@pytest.mark.parametrize("what", ["no folder yet", "a folder with a study"])
def test_a_read_only_folder(what, folder):
    if what == "a folder with a study":
        kill_after(folder, 1, (3, 0.0))
    place = folder / "tune" if (folder / "tune").exists() else folder
    place.chmod(0o555)
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    try:
        process = started(1, preexec_fn=without_the_rights_of_root, stdout=subprocess.PIPE)
        ended = subprocess.run(**process, check=False, timeout=170)
        assert {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()} == before
    finally:
        place.chmod(0o755)
    assert ended.returncode == 2
    assert ended.stderr.startswith("fastbn tune: error: --out tune")
    assert "Permission denied" in ended.stderr
    assert ended.stderr.count("\n") == 1
    check_the_next_run_goes_on(folder, 1)


def test_what_was_there_stays_where_the_report_cannot_be_written(own, tmp_path, capsys):  # noqa: F811
    assert run([*own, "--trials", "3"], capsys)[0] == 0
    before = (tmp_path / "tune" / "best.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "tune" / "journal").stat().st_size + 1000  # all but the pictures
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        status, _, err = run([*own, "--trials", "3"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert err.startswith("fastbn tune: error: --out ")
    assert "history.png: cannot be written: " in err
    assert (tmp_path / "tune" / "best.json").read_bytes() == before
    assert not [path.name for path in (tmp_path / "tune").iterdir() if path.suffix == ".tmp"]
