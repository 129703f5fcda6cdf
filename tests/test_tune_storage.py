"""Storages: journals that were cut, full disks, what is refused, what is waited for."""

import json
import logging
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from tune_objectives import bowl, content, quiet

from fastbn.demo import DemoError
from fastbn.tune import log_uniform, rounds, storage
from fastbn.tune.storage import absolute, opened

optuna = pytest.importorskip("optuna")

TIER = {"lr": log_uniform(1e-4, 1)}


def words(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "fastbn.tune"]


def interrupted(url, after):
    """Search until the objective fails."""
    calls = []

    def objective(params):
        calls.append(params)
        if len(calls) > after:
            raise ArithmeticError
        return bowl(params)

    objective.__module__, objective.__qualname__ = bowl.__module__, bowl.__qualname__
    with pytest.raises(ArithmeticError):
        quiet(objective, trials=6, storage=url)


@pytest.mark.parametrize("left", [b"", b"{", b'{"op_code":', b'{"op_code":8,"worker_id":"a', None])
@pytest.mark.parametrize("nuls", [0, 5000])
def test_a_journal_that_was_cut(left, nuls, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(rounds, "GRACE", 0.3)  # the last record says that a trial waits again
    journal = tmp_path / "journal"
    interrupted(str(journal), 4)
    lines = journal.read_bytes().splitlines(keepends=True)
    cut = lines[-1][:-1] if left is None else left  # the last record is all but its end
    if cut or nuls:
        journal.write_bytes(b"".join(lines[:-1]) + cut + bytes(nuls))
    result = quiet(trials=6, storage=str(journal))
    assert content(result) == content(quiet(trials=6))
    for line in journal.read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")
        json.loads(line)
    told = words(caplog)
    assert len(told) == bool(cut or nuls)
    for text in told:
        assert text.startswith(f"storage: {journal}: its last record was cut; ")
        assert text.endswith(f" {len(cut) + nuls} bytes are left out")


def test_damage_in_the_middle(tmp_path):
    journal = tmp_path / "journal"
    interrupted(str(journal), 4)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], lines[5][:9] + b"\n", *lines[6:]]))
    before = journal.read_bytes()
    with pytest.raises(DemoError, match=r"^storage: .*journal: cannot be used: "):
        quiet(trials=6, storage=str(journal))
    assert journal.read_bytes() == before


@pytest.mark.parametrize("text", ["notes", "two\nlines", '{"a": 1}', "two\nlines\n"])
def test_a_file_that_is_no_journal_stays_as_it_is(text, tmp_path):
    (tmp_path / "notes.txt").write_text(text)
    with pytest.raises(DemoError, match=r"^storage: .*notes.txt: cannot be used: "):
        quiet(trials=6, storage=str(tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///", ":memory:", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:",
     "sqlite:///?timeout=3", "sqlite:///file:x?mode=memory&uri=true", "sqlite://study.db"],
)  # fmt: skip
def test_a_database_in_memory_is_refused(url):
    for workers in (1, 2):
        with pytest.raises(DemoError) as caught:
            quiet(storage=url, workers=workers)
        expected = f"storage: expected a file or sqlite:///FILE, got {url}: workers cannot share a"
        assert str(caught.value) == f"{expected} database in memory"


@pytest.mark.parametrize("url", ["", 5, b"journal"])
def test_no_name(url):
    with pytest.raises(DemoError, match="storage: expected a name, got "):
        quiet(storage=url)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no /dev")
@pytest.mark.parametrize("url", ["/dev/null", "/dev/full", "/dev", "sqlite:////dev/null"])
def test_a_device_and_a_folder_are_refused(url):
    with pytest.raises(DemoError) as caught:
        quiet(storage=url)
    assert str(caught.value).startswith(f"storage: {url}: cannot be used: ")
    assert "expected a file, got a folder or a device" in str(caught.value)


def test_names_are_right_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/journal") == str(tmp_path / "a" / "journal")
    assert absolute("sqlite:///a.db?x=1") == f"sqlite:///{tmp_path / 'a.db'}?x=1"
    for url in (str(tmp_path), f"sqlite:///{tmp_path}/a.db", "grpc://here:1", "postgresql://a/b"):
        assert absolute(url) == url


@contextmanager
def files_of_at_most(size):
    """Let writes beyond a size fail, as on a full disk: the last one is cut."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [700, 3000, 5001])
def test_a_full_disk_costs_no_finished_trial(size, tmp_path):
    journal = tmp_path / "journal"
    with pytest.raises(DemoError) as caught, files_of_at_most(size):
        quiet(trials=6, storage=str(journal))
    assert str(caught.value).startswith(f"storage: {journal}: cannot be used: [Errno 27] ")
    calls = []

    def counted(params):
        calls.append(params)
        return bowl(params)

    counted.__module__, counted.__qualname__ = bowl.__module__, bowl.__qualname__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "GRACE", 0.5)  # nothing could say that the last trial waits again
        result = quiet(counted, trials=6, storage=str(journal))
    assert content(result) == content(quiet(trials=6))
    if size > 5000:
        assert 1 <= len(calls) < 6


def test_a_full_disk_under_a_database(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    quiet(trials=1, storage=url, study="first")
    with (
        pytest.raises(DemoError) as caught,
        files_of_at_most((tmp_path / "study.db").stat().st_size),
    ):
        quiet(trials=40, storage=url)
    assert str(caught.value).startswith(f"storage: {url}: cannot be used: ")
    assert "disk" in str(caught.value)


@pytest.fixture
def impatient(monkeypatch):
    """Let a wait be told soon."""
    for module in (rounds, storage):
        monkeypatch.setattr(module, "SLOW", 0.1)
    monkeypatch.setattr(rounds, "POLL", 0.02)


def first(params):
    return params["lr"]


def told_within(caplog, seconds, text):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(text in record.getMessage() for record in caplog.records):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.usefixtures("impatient")
def test_the_lock_of_a_journal_that_was_left_behind(tmp_path, caplog):
    lock = tmp_path / "journal.lock"
    lock.touch()
    seen = []

    def remove():
        seen.append(told_within(caplog, 20, f"waiting for {lock}: another process writes, or was"))
        lock.unlink()

    thread = threading.Thread(target=remove)
    thread.start()
    quiet(trials=1, storage=str(tmp_path / "journal"))
    thread.join()
    assert seen == [True]


@pytest.mark.usefixtures("impatient")
def test_the_trial_of_a_worker_that_is_gone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(rounds, "GRACE", 1.0)
    url = str(tmp_path / "journal")
    with opened(url) as shared:
        plan = rounds.Plan(first, TIER, {}, {}, 1, 1, "random", True, 0, "study")
        rounds.Round(plan, shared, None, []).claim("gone-0")
    [record] = quiet(first, TIER, trials=1, rounds=1, storage=url).trials
    assert record.attempts == 2
    [told] = words(caplog)
    assert told.startswith("waiting for trial 0 of gone-0; a worker that gives no sign of life for")


@pytest.mark.usefixtures("impatient")
def test_a_plan_that_nobody_writes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(rounds, "GRACE", 0.6)
    url = str(tmp_path / "journal")
    with opened(url) as shared:
        optuna.create_study(storage=shared, study_name="study 1")
    quiet(trials=1, storage=url)
    assert words(caplog) == ["waiting for the plan of 'study 1': at most 1 s for who has begun it"]


def test_words_go_to_a_logger_of_its_own():
    assert storage.log is logging.getLogger("fastbn.tune")
