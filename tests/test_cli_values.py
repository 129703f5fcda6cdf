"""Odd values of every type, at every option of every command and every key of a configuration.

Whatever comes from outside ends in a result or in one line that says what was expected: never in a
traceback, and never in a change of a file. `fastbn tune` has tests of its own.
"""

import argparse
import json
import re
import shutil
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from support import write_blobs
from test_cli import run
from test_demo_checkpoint import forge

from fastbn.cli import COMMANDS, main, results
from fastbn.demo import DemoError, watch
from fastbn.demo import config as demo_config
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.config import Config
from fastbn.demo.data import load
from fastbn.demo.log import RULES, Log, Nudge
from fastbn.demo.train import Trainer

pytest.importorskip("filelock")
pytest.importorskip("safetensors")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# Where an option needs another one to have a meaning.
BESIDE = {
    "data_dir": ("data", "fashion-mnist"),
    "momentum": ("optimizer", "momentum"),
    "decay_rate": ("lr_decay", "inverse"),
    "zero_gamma": ("model", "resnet"),
}
ODD = [
    "", " ", "-", "--", ".", "loop", "none/none", "blobs.npz", "saved", "c.json", "x" * 300, "@x",
    "-1", "0", "1", "1.5", "-0.0", "1e400", "1e-400", "nan", "-inf", "1_0", "0x10", "9" * 400,
    "9" * 5000, "999999999999", "999999999999,8", "1,,2", "0,1", "8,-8", "a,b", "8,8,8,8,8,8,8,8",
    "true", "None", "[]", "{}", "null", "%s %d", "ü", "漢.npz", "\udcff.npz", "a\nb", "\x1b[1m",
    "٣", "mlp", "resnet", "instance", "cosine", "loop/x.png", "x.png", "loop/x.safetensors",
]  # fmt: skip
NUMBERS = st.integers(-5, 64) | st.integers(10**12, 10**25)  # in between there may be memory
TEXTS = st.text(st.characters(exclude_characters="/\0"), max_size=20)
WORDS = st.sampled_from(ODD) | TEXTS | NUMBERS.map(str) | st.floats().map(str)
LEAVES = (
    st.none() | st.booleans() | NUMBERS | st.just(10**400) | st.floats() | st.text(max_size=20)
    | st.sampled_from([*ODD, "a\0.npz", "\ud800.npz"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4
)


def examples(number):
    return hypothesis.settings(
        derandomize=True, database=None, deadline=None, max_examples=number,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )  # fmt: skip


def options_of(command):
    parser = argparse.ArgumentParser(add_help=False)
    getattr(import_module(f"fastbn.cli.{command}"), "add_options", lambda _: None)(parser)
    return [(action.option_strings or [""])[0] for action in parser._actions]


OPTIONS = [(name, option) for name in COMMANDS if name != "tune" for option in options_of(name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a folder with data, a configuration, a checkpoint, a run that died, and a circle."""
    folder = tmp_path_factory.mktemp("made")
    data = write_blobs(folder)
    quick = ["--data", data, "--hidden", "4", "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "draw", lambda *_, **__: None)
        assert main(["train", *quick, "--save", str(folder / "saved")]) == 0
        assert main(["watch", str(folder / "run"), *quick, "--epochs", "2"]) == 0
    log = folder / "run" / "log.jsonl"
    log.write_text(
        "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8"
    )
    (folder / "c.json").write_text("{}", encoding="utf-8")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture
def there(made, monkeypatch):
    """Go there; trainings end after two epochs at the latest."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(watch, "draw", lambda *_, **__: None)
    monkeypatch.setattr(watch, "check_drawing", lambda: None)
    monkeypatch.setattr(results, "draw", lambda path, _: path.touch())
    monkeypatch.setattr(results, "check_drawing", lambda: None)
    train_epoch = Trainer.train_epoch

    def two_epochs(self, title):
        if len(self.history) >= 2:
            raise KeyboardInterrupt
        return train_epoch(self, title)

    monkeypatch.setattr(Trainer, "train_epoch", two_epochs)
    return made


def contents(folder):
    """Return what is there, but for locks, which may be left."""
    paths = [path for path in folder.rglob("*") if path.suffix != ".lock" and path.name != "lock"]
    return {path: path.is_file() and path.read_bytes() for path in paths}


def restore(folder, before):
    for path in contents(folder).keys() - before.keys():
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    for path, content in before.items():
        if content is not False and path.read_bytes() != content:
            path.write_bytes(content)


def check_end(argv, folder, capsys):
    """Run a command to its clean end, and make the folder what it was."""
    before = contents(folder)
    try:
        status, _, err = run(argv, capsys)
        err = re.sub(r"\r[^\n]*\r", "", err)  # the bar, which --mpi shows beside any terminal
        if status == 2:
            assert re.fullmatch(r"fastbn \w+: error: [^\n]+\n", err)
            assert contents(folder) == before or "the loss is not finite" in err
        else:
            assert status in (0, 130)
            assert (err == "") == (status == 0)
    finally:
        restore(folder, before)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_odd_values_of_every_option(command, option, there, capsys):
    base = {
        "train": ["--data", "blobs.npz", "--hidden", "4", "--epochs", "1"],
        "watch": ["new", "--data", "blobs.npz", "--hidden", "4", "--epochs", "1"],
        "resume": ["saved"],
        "nudge": ["run", "--stop"],
        "replay": ["run"],
    }[command]
    name, value = BESIDE.get(option[2:].replace("-", "_"), ("", ""))
    if name and command in ("train", "watch"):
        base += [demo_config.option(name), value]

    @examples(5)
    @hypothesis.given(WORDS)
    def check(word):
        words = [*base, f"{option}={word}"] if option else [word, *base[1:]]
        check_end([command, *words], there, capsys)

    check()
    if option:
        some = ODD[OPTIONS.index((command, option)) % 8 :: 8]
        for word in (option, *(f"{option}={word}" for word in some)):
            check_end([command, *base, word], there, capsys)


@pytest.mark.parametrize("key", Config.__dataclass_fields__)
def test_odd_values_of_every_key(key, there, capsys):
    number, saved = count(), load_checkpoint(Path("saved"), {})
    head, *_ = (there / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    beside = dict([BESIDE[key]]) if key in BESIDE else {}

    @examples(15)
    @hypothesis.given(VALUES)
    def check(value):
        path = there / "odd.json"
        fields = {"data": "blobs.npz", "hidden": [4], **beside, key: value}
        path.write_text(json.dumps(fields), encoding="utf-8")
        command = ["train", "--epochs", "1"] if next(number) % 2 else ["resume", "saved"]
        check_end([*command, "--config", path], there, capsys)
        copy = there / "copy"
        saved.save(copy)
        try:
            forge(copy, run={"config": {key: value}})
            load_checkpoint(copy, {})
        except (DemoError, KeyboardInterrupt):
            pass
        copy.unlink()
        (there / "odd").mkdir(exist_ok=True)
        line = json.loads(head)
        line["config"][key] = value
        (there / "odd" / "log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        check_end(["resume", "odd"], there, capsys)

    check()


EVENTS = {
    "epoch": ["epoch", "lr", "momentum", "loss", "validation_accuracy"],
    "nudge": ["nudge"],
    "refused": ["nudge", "why"],
    "resume": ["epochs"],
    "end": ["event"],
}


@pytest.mark.parametrize(
    ("event", "key"), [(event, key) for event, keys in EVENTS.items() for key in keys]
)
def test_odd_values_in_a_log(event, key, there, capsys):
    log = there / "run" / "log.jsonl"
    head, first = log.read_text(encoding="utf-8").splitlines()
    whole = {**json.loads(first), "nudge": {"lr": 0.1}, "why": "", "epochs": 3, "event": event}

    @examples(10)
    @hypothesis.given(VALUES)
    def check(value):
        log.write_text(f"{head}\n{json.dumps({**whole, key: value})}\n", encoding="utf-8")
        try:
            Log.read(log.parent)
        except DemoError:
            return
        for words in (["resume", "run"], ["replay", "run"], ["nudge", "run", "--lr", "0.1"]):
            check_end(words, there, capsys)

    try:
        check()
    finally:
        log.write_text(f"{head}\n{first}\n", encoding="utf-8")


@pytest.mark.parametrize("key", [*RULES, "more"])
def test_odd_values_in_a_nudge(key):
    @examples(50)
    @hypothesis.given(VALUES)
    def check(value):
        try:
            nudge = Nudge.read(json.dumps({key: value}))
        except DemoError:
            return
        assert nudge.changes() == {key: value}
        assert Nudge.read(json.dumps(nudge.changes())) == nudge

    check()


@pytest.mark.parametrize("kind", "?bBhHiIlLqQefdgFDGSUOVmM")
@pytest.mark.parametrize("name", ["x", "y", "x_test", "y_test"])
def test_odd_arrays(name, kind, tmp_path):
    arrays = {"x": np.eye(40), "y": np.arange(40) % 3}
    for part in ("x", "y"):
        if name == f"{part}_test":
            arrays = {f"{p}_{n}": a for p, a in arrays.items() for n in ("train", "test")}
    info = np.iinfo(kind).max if kind in "bBhHiIlLqQ" else 1
    made = np.full(arrays[name].shape, info).astype(kind) if kind != "O" else np.full(40, None)
    arrays[name] = made
    np.savez(tmp_path / "d.npz", **arrays)
    try:
        data = load(str(tmp_path / "d.npz"))
    except DemoError:
        return
    assert kind in "?bBhHiIlLqQefdg"
    assert data.train[0].dtype == np.float32
