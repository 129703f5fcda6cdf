"""What can go wrong in the folder of a babysat run, and what a replay notices."""

import json
import sys

import numpy as np
import pytest
from demo_cases import assert_same_bits
from demo_runs import ASK, config_for, disturb, log_of, plain, stop_after_3
from support import write_blobs

from fastbn.demo import DemoError, watch
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.log import Nudge
from fastbn.demo.watch import checkpoint, replay, resume, send, start


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Save the time of the pictures, which have tests of their own."""
    monkeypatch.setattr(watch, "draw", lambda *_, **__: None)


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def nudged(folder, monkeypatch):
    """Return what trains a run; nudges arrive during the first, second, ... epoch trained."""

    def nudged(nudges=None, begin=None, **given):
        with monkeypatch.context() as patch:
            disturb(patch, folder, nudges or {})
            return begin() if begin else start(folder, config_for(folder, **given))

    return nudged


@pytest.fixture
def stopped(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after_3(folder, patch)
    return folder


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
@pytest.mark.parametrize("name", ["none", ".", "blobs.npz"])
def test_no_run_there(name, ask, folder, tmp_path):
    with pytest.raises(DemoError, match=f"{tmp_path / name}: no run of `fastbn watch`"):
        ask(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["blobs.npz"]


def test_a_death_in_the_middle_of_a_file(stopped):
    for name in ("epoch-0004.safetensors.12ab", "log.jsonl.123.4", "curves.png.f0", "mine"):
        (stopped / f".{name}.tmp").write_bytes(b"incomplete")
    resume(stopped, {})
    assert [path.name for path in stopped.glob(".*")] == [".mine.tmp"]


def test_a_missing_extra(stopped, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    for ask in ASK.values():
        with pytest.raises(DemoError, match=r'filelock .*: pip install "fastbn\[demo\]"'):
            ask(stopped)
    assert not (stopped / "nudges.jsonl").exists()


def test_one_process_trains(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE", 0.05)
    with watch._locked(stopped / "lock"):
        assert send(stopped, Nudge(lr=0.1)) is True
        for name in ("resume", "replay"):
            with pytest.raises(watch.BusyError, match="another process is training there"):
                ASK[name](stopped)
    other = tmp_path / "other"
    other.mkdir()
    with watch._locked(other / "lock"), pytest.raises(watch.BusyError):
        start(other, config_for(stopped))
    start(other, config_for(stopped, epochs=1))  # a lock is not in the way


def test_a_folder_with_something_in_it(stopped, tmp_path):
    before = {path: path.read_bytes() for path in stopped.glob("*.*")}
    message = f"got one with a run of 3 epochs; `fastbn resume {stopped}` goes on with it"
    with pytest.raises(DemoError, match=message):
        start(stopped, config_for(stopped))
    with pytest.raises(DemoError, match="expected a new or empty folder, got one with files"):
        start(tmp_path, config_for(stopped))
    with pytest.raises(DemoError, match=r"blobs\.npz: cannot be written"):
        start(tmp_path / "blobs.npz", config_for(stopped))
    assert {path: path.read_bytes() for path in stopped.glob("*.*")} == before


def test_a_configuration_that_does_not_fit_leaves_no_folder(folder):
    with pytest.raises(DemoError, match="--batch-size"):
        start(folder, config_for(folder, batch_size=500))
    assert not folder.exists()


def forge(folder, number, **fields):
    """Change fields of a line of the log."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **fields})
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (0, {"format": "another"}),
        (0, {"config": 5}),
        (0, {"config": {"hidden": [8]}}),
        (1, {"epoch": 7}),
        (1, {"epoch": "1"}),
        (1, {"loss": "low"}),
        (1, {"loss": 10**400}),
        (1, {"event": "party"}),
        (2, {"event": "nudge"}),
        (2, {"event": "nudge", "nudge": {"lr": -1.0}}),
        (2, {"event": "nudge", "nudge": {"rollback": 5}}),
        (2, {"event": "nudge", "nudge": {"more": 5}}),
        (2, {"event": "resume", "epochs": 0}),
    ],
)
def test_a_forged_log(number, fields, stopped):
    forge(stopped, number, **fields)
    before = {path: path.read_bytes() for path in stopped.glob("*.*")}
    for ask in (*ASK.values(), lambda folder: start(folder, config_for(folder))):
        with pytest.raises(DemoError, match="not that of `fastbn watch`, or damaged"):
            ask(stopped)
    assert {path: path.read_bytes() for path in stopped.glob("*.*")} == before


def test_a_run_of_an_earlier_version(stopped):
    forge(stopped, 0, format="fastbn watched run 1")
    for ask in ASK.values():
        with pytest.raises(
            DemoError, match=r"expected a fastbn watched run 2, got a .* 1, of anot"
        ):
            ask(stopped)


def test_a_truncated_log(stopped):
    path = stopped / "log.jsonl"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-30], b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(DemoError, match="or damaged"):
            resume(stopped, {})


def test_a_lost_checkpoint(stopped):
    checkpoint(stopped, 3).unlink()
    with pytest.raises(DemoError, match=r"epoch-0003.safetensors: no such file"):
        resume(stopped, {})
    checkpoint(stopped, 2).replace(checkpoint(stopped, 3))
    with pytest.raises(DemoError, match=r"epoch-0003.safetensors: not of this run, or damaged"):
        resume(stopped, {})


def test_a_replay_tells_the_first_epoch_that_differs(stopped):
    loss = log_of(stopped).rows[1]["loss"]
    path = checkpoint(stopped, 3)
    trainer = load_checkpoint(path, {})
    trainer.history[1]["loss"] = 0.5
    trainer.save(path)
    forge(stopped, 2, loss=0.5)
    message = f"epoch 2: expected loss 0.5 as in log.jsonl, got {loss}"
    with pytest.raises(DemoError, match=message):
        replay(stopped)


def test_a_replay_tells_a_checkpoint_of_other_bits(stopped):
    path = checkpoint(stopped, 3)
    trainer = load_checkpoint(path, {})
    weight = trainer.network.children["1"].params["weight"]
    weight[0, 0] = np.nextafter(weight[0, 0], np.float32(9))
    trainer.save(path)
    message = r"network.1.weight: expected the bits of epoch-0003.safetensors, got others"
    with pytest.raises(DemoError, match=message):
        replay(stopped)


def test_a_replay_notices_a_forged_nudge(folder, nudged):
    nudged({1: [{"lr": 0.01}]})
    forge(folder, 2, nudge={"lr": 0.02})
    with pytest.raises(DemoError, match=r"epoch 2: expected lr 0.01 .* got 0.02"):
        replay(folder)


def test_a_replay_leaves_the_folder_as_it_is(folder, nudged):
    nudged({2: [{"rollback": 1}]})
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    replay(folder)
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_a_disk_that_fills_up(stopped, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DemoError, match="No space left on device"):
            resume(stopped, {})
    assert_same_bits(resume(stopped, {}), plain(stopped, optimizer="sgd"))
