"""Trainings on the command line that are interrupted, resumed, babysat and replayed."""

import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import write_blobs
from test_cli import LAST_LINE, command, is_png, run

from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.log import Log
from fastbn.demo.train import Trainer


@pytest.fixture
def blobs(tmp_path):
    """Return options to train a small network shortly, on data that are easy to learn."""
    for module in ("safetensors", "tqdm", "threadpoolctl"):
        pytest.importorskip(module)
    return ["train", "--data", write_blobs(tmp_path), "--hidden", "8,8", "--epochs", "3"]


@pytest.fixture
def interrupted(monkeypatch):
    """Let Ctrl-C arrive in the second epoch."""
    train_epoch = Trainer.train_epoch

    def interrupted(self, title):
        if len(self.history) == 1:
            raise KeyboardInterrupt
        return train_epoch(self, title)

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_without_save(blobs, capsys):
    status, out, err = run(blobs, capsys)
    assert status == 130
    assert len(out.splitlines()) == 1
    assert (
        err == "\ninterrupted: nothing was saved; --save FILE keeps each epoch that is finished\n"
    )


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_tells_the_command_that_resumes(blobs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    file, plot, weights = (
        tmp_path / n for n in ("a run.safetensors", "curves.png", "w.safetensors")
    )
    status, _, err = run([*blobs, "--save", file, "--plot", plot, "--export", weights], capsys)
    assert status == 130
    python, *words = shlex.split(err.splitlines()[-1])
    assert python == sys.executable
    assert words[:3] == ["-m", "fastbn", "resume"]
    monkeypatch.undo()
    status, out, err = run(words[2:], capsys)
    assert (status, err) == (0, "")
    assert out.startswith("epoch 2/3")
    assert LAST_LINE.fullmatch(out.splitlines()[-1])
    assert is_png(plot)
    assert weights.exists()


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_before_anything_is_built(blobs, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    file = tmp_path / "run"
    assert run([*blobs, "--save", file], capsys)[0] == 130
    monkeypatch.setattr(np.random, "default_rng", interrupt)
    status, _, err = run([*blobs, "--save", tmp_path / "other"], capsys)
    assert (status, "nothing was saved" in err) == (130, True)
    status, _, err = run(["train", "--resume", file, "--save", tmp_path / "other"], capsys)
    assert (status, f"fastbn resume {file}" in err) == (130, True)


def test_resume_equals_an_uninterrupted_run(blobs, tmp_path, capsys):
    whole, part, copy = (tmp_path / name for name in ("whole", "part", "copy"))
    expected = run([*blobs, "--save", whole], capsys)[1]
    run([*blobs, "--epochs", 1, "--save", part], capsys)
    first = part.read_bytes()
    status, out, _ = run(["train", "--resume", part, "--epochs", 3, "--save", copy], capsys)
    assert status == 0
    assert part.read_bytes() == first  # --save names another file
    assert out.splitlines() == expected.splitlines()[1:]
    assert copy.read_bytes() == whole.read_bytes()
    run(["train", "--resume", part, "--epochs", 3], capsys)
    assert part.read_bytes() == whole.read_bytes()


def test_resuming_a_finished_run_tells_its_accuracy(blobs, tmp_path, capsys):
    file = tmp_path / "run"
    expected = run([*blobs, "--save", file], capsys)[1].splitlines()[-1]
    assert run(["train", "--resume", file], capsys) == (0, f"{expected}\n", "")


def test_a_resumed_run_keeps_its_options(blobs, tmp_path, capsys):
    file = tmp_path / "run"
    run([*blobs, "--save", file], capsys)
    before = file.read_bytes()
    status, out, err = run(["train", "--resume", file, "--lr", "0.5"], capsys)
    assert (status, out) == (2, "")
    assert "--lr: cannot change on resuming: expected 0.003" in err
    assert file.read_bytes() == before
    assert run(["train", "--resume", file, "--lr", "0.003"], capsys)[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_a_real_ctrl_c(blobs, tmp_path):
    file = tmp_path / "run"
    process = subprocess.Popen(
        **command(*blobs, "--epochs", 10**6, "--save", file),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for _ in range(2):
            assert process.stdout.readline().startswith("epoch ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith(f" -m fastbn resume {file}")
    assert "Traceback" not in err
    finished = 2 + len(out.splitlines())
    assert finished <= len(load_checkpoint(file, {}).history) <= finished + 1


@pytest.fixture
def folder(tmp_path):
    for module in ("filelock", "matplotlib"):
        pytest.importorskip(module)
    return tmp_path / "a run"


def lines_until(process, text):
    """Read what a process prints up to a line with that text."""
    lines = [process.stdout.readline()]
    while text not in lines[-1]:
        assert lines[-1], "".join(lines)
        lines.append(process.stdout.readline())
    return lines


def test_a_babysat_run(blobs, folder, capsys):
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    train = [*blobs, "--epochs", 10**4, "--watch", folder]
    with subprocess.Popen(**command(*train), **pipe) as process:
        lines_until(process, "epoch     3/10000  loss ")
        sent = "sent, for when the next epoch begins: lr 0.01, momentum 0.8\n"
        nudge = ["nudge", folder, "--lr", "0.01", "--momentum", "0.8"]
        assert run(nudge, capsys) == (0, sent, "")
        lines_until(process, ": lr 0.01, momentum 0.8; epoch ")
        lines_until(process, "epoch ")
        assert run(["nudge", folder, "--rollback", "2"], capsys)[0] == 0
        lines_until(process, ": rollback to 2; epoch 3 has the learning rate 0.00243\n")
        assert lines_until(process, "epoch ")[0].startswith("epoch     3/10000  loss ")
        status, out, err = run(["nudge", folder, "--rollback", "5000"], capsys)
        assert (status, out) == (2, "")
        assert re.fullmatch(
            r"fastbn nudge: error: --rollback: expected .* kept, 0, 1, 2, 3.*, got 5000\n", err
        )
        assert run(["nudge", folder, "--lr", "0.02"], capsys)[0] == 0
        lines_until(process, ": lr 0.02; epoch ")
        lines_until(process, "epoch ")
        process.kill()
    epochs = len(Log.read(folder).standing)

    status, out, err = run(["nudge", folder, "--momentum", "0.7"], capsys)
    assert out == f"sent, for when fastbn resume '{folder}' goes on: momentum 0.7\n"
    with subprocess.Popen(**command("train", "--resume", folder), **pipe) as process:
        lines = lines_until(process, "epoch ")
        lines += lines_until(process, "loss ")
        assert lines[0] == (
            f"nudge before epoch {epochs + 1}: momentum 0.7; epoch {epochs + 1} has the learning"
            f" rate {0.02 * 0.9**epochs:g}\n"
        )
        assert lines[1].startswith(f"epoch {epochs + 1:5}/10000  loss ")
        assert run(["nudge", folder, "--stop"], capsys)[0] == 0
        out, _ = process.communicate()
    assert process.returncode == 0
    *_, curves, last = out.splitlines()
    assert curves == f"curves: {folder / 'curves.png'}"
    assert is_png(folder / "curves.png")

    replay = subprocess.run(
        **command("train", "--replay", folder), **pipe, check=True, stderr=subprocess.STDOUT
    )
    log = Log.read(folder)
    assert [str(nudge) for _, nudge, _ in log.marks] == [
        "lr 0.01, momentum 0.8",
        "rollback to 2",
        "lr 0.02",
        "momentum 0.7",
        "stop",
    ]
    assert len(log.rows) > len(log.standing)
    assert replay.stdout.splitlines()[-2:] == [
        f"the same bits: {len(log.rows)} epochs, 5 nudges",
        last,
    ]
    assert LAST_LINE.fullmatch(last)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_in_a_folder(blobs, folder, capsys, monkeypatch):
    status, _, err = run([*blobs, "--watch", folder], capsys)
    assert status == 130
    assert "interrupted: the finished epochs are saved; resume with\n" in err
    words = shlex.split(err.splitlines()[-1])[1:]
    assert words == ["-m", "fastbn", "resume", str(folder)]
    monkeypatch.undo()
    status, out, err = run(words[2:], capsys)
    assert (status, err) == (0, "")
    assert [line[:9] for line in out.splitlines()[:2]] == ["epoch 2/3", "epoch 3/3"]
    assert run(words[2:], capsys) == (0, "\n".join([*out.splitlines()[2:], ""]), "")
    status, replayed, err = run(["train", "--replay", folder], capsys)
    assert (status, err) == (0, "")
    assert replayed.splitlines()[1:3] == out.splitlines()[:2]

    file = folder / "epoch-0002.safetensors"
    before = file.read_bytes()
    status, out, err = run(["train", "--resume", file], capsys)
    assert (status, out) == (2, "")
    assert f"{file}: expected --save with another file, or the folder alone" in err
    assert file.read_bytes() == before
    copy = folder.with_name("copy")
    assert run(["train", "--resume", file, "--save", copy], capsys)[0] == 0
    assert copy.read_bytes() == (folder / "epoch-0003.safetensors").read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_epoch", interrupt)
    assert run(["train", "--replay", folder], capsys) == (130, "", "\ninterrupted\n")
    monkeypatch.setattr(Trainer, "__init__", interrupt)
    status, _, err = run([*blobs, "--watch", folder.with_name("other")], capsys)
    assert (status, "nothing was saved" in err) == (130, True)


@pytest.mark.parametrize("old", [False, True])
def test_as_it_was_spelt_before(old, blobs, folder, capsys):
    def spelt(name, path, *options):
        words = ["train", f"--{name}", path] if old else [name, path]
        return run([*words, *options], capsys)

    status, out, err = spelt("watch", folder, *blobs[1:])
    assert (status, err) == (0, "")
    assert out.splitlines()[-2] == f"curves: {folder / 'curves.png'}"
    assert spelt("replay", folder)[1].splitlines()[-2] == "the same bits: 3 epochs, 0 nudges"
    assert spelt("resume", folder, "--epochs", "4")[1].startswith("epoch 4/4")
    assert spelt("watch", folder)[0] == 2
