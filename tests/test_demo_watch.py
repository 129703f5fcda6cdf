"""A babysat run: nudges, rollbacks, what is kept, deaths at any moment, replay to the same bits."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import count, pairwise

import numpy as np
import pytest
from support import write_blobs

from fastbn import optim
from fastbn.demo import DemoError, train, watch
from fastbn.demo.data import load
from fastbn.demo.files import write_atomically
from fastbn.demo.train import DivergedError, Trainer, configure, decayed_lr, load_checkpoint
from fastbn.demo.watch import Log, Nudge, checkpoint, replay, resume, send, start

for module in ("filelock", "matplotlib", "threadpoolctl", "tqdm"):
    pytest.importorskip(module)

QUICK = {"hidden": (8,), "epochs": 6, "lr_decay": "none"}
DRAW = watch.draw


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Save the time of the pictures, which have tests of their own."""
    monkeypatch.setattr(watch, "draw", lambda *_, **__: None)


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path)
    return tmp_path / "run"


def config_for(folder, **given):
    return configure({**QUICK, "data": str(folder.parent / "blobs.npz"), **given})


@pytest.fixture
def nudged(folder, monkeypatch):
    """Return what trains a run; nudges arrive during the first, second, ... epoch trained."""

    def nudged(nudges=None, begin=None, **given):
        train_epoch, trained = Trainer.train_epoch, count(1)

        def disturbed(self, title):
            for nudge in (nudges or {}).get(next(trained), ()):
                send(folder, Nudge(**nudge))
            return train_epoch(self, title)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_epoch", disturbed)
            return begin() if begin else start(folder, config_for(folder, **given))

    return nudged


def log_of(folder):
    return Log.read(folder, "test")


def column(folder, name):
    return [row[name] for row in log_of(folder).rows]


def plain(folder, **given):
    """Train without a folder."""
    config = config_for(folder, **given)
    trainer = Trainer(config, load(config.data))
    trainer.run()
    return trainer


def assert_same_bits(one, other):
    for (name, a), (same, b) in zip(one.state().items(), other.state().items(), strict=True):
        assert name == same
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def test_without_a_nudge_it_is_a_training_as_any_other(folder, tmp_path, capsys):
    saved = tmp_path / "saved.npz"
    config = config_for(folder)
    Trainer(config, load(config.data)).run(saved)
    out = capsys.readouterr().out
    start(folder, config)
    assert capsys.readouterr().out == out
    assert checkpoint(folder, 6).read_bytes() == saved.read_bytes()


RUNS = [
    {"optimizer": "sgd", "lr_decay": "inverse"},
    {"optimizer": "momentum", "lr_decay": "staircase"},
    {"optimizer": "rmsprop", "norm": "none"},
    {"optimizer": "adam", "lr_decay": "cosine"},
    {"optimizer": "adam", "model": "resnet", "hidden": (2,)},
]


@pytest.mark.parametrize("given", RUNS, ids=lambda given: "-".join(map(str, given.values())))
def test_nudges_and_rollbacks_replay_to_the_same_bits(given, folder, nudged, capsys):
    has_momentum = given["optimizer"] in train.OPTIMIZER
    nudges = {
        2: [{"lr": 0.01}],
        3: [{"momentum": 0.5}] if has_momentum else [{"lr": 0.02}],
        5: [{"rollback": 3, "lr": 0.001}],
        6: [{"lr": 0.004}, {"rollback": 0}, {"lr": 0.003}],
    }
    trainer = nudged(nudges, **given)
    assert column(folder, "epoch") == [1, 2, 3, 4, 5, 4, 1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert_same_bits(replay(folder), trainer)
    assert capsys.readouterr().out.splitlines()[-1] == "the same bits: 12 epochs, 6 nudges"


@pytest.mark.parametrize("lr_decay", train.CHOICES["lr_decay"])
def test_a_nudged_learning_rate_is_that_of_epoch_0(lr_decay, folder, nudged, capsys):
    nudged({2: [{"lr": 0.01}]}, lr=0.1, lr_decay=lr_decay)
    before, after = (config_for(folder, lr=lr, lr_decay=lr_decay) for lr in (0.1, 0.01))
    expected = [decayed_lr(before if n < 2 else after, n) for n in range(6)]
    assert column(folder, "lr") == expected
    told = f"nudge before epoch 3: lr 0.01; epoch 3 has the learning rate {expected[2]:g}\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "default"), [("momentum", 0.9), ("adam", 0.9), ("sgd", 0.0), ("rmsprop", None)]
)
def test_momentum_is_that_of_the_optimizer(optimizer, default, folder, nudged):
    nudges = {2: [{"momentum": 0.5}]} if default else {}
    trainer = nudged(nudges, optimizer=optimizer)
    assert column(folder, "momentum") == [default] * 2 + [0.5 if default else default] * 4
    match trainer.optimizer:
        case optim.Adam():
            assert trainer.optimizer.betas == (0.5, 0.999)
        case optim.SGD():
            assert trainer.optimizer.momentum == (0.5 if default else 0)


def test_a_rollback_alone_changes_nothing_but_the_time(folder, nudged):
    trainer = nudged({4: [{"rollback": 2}], 6: [{"rollback": 0}]})
    assert column(folder, "epoch") == [1, 2, 3, 4, 3, 4, 1, 2, 3, 4, 5, 6]
    assert column(folder, "undone") == [1] * 6 + [0] * 6
    assert_same_bits(trainer, plain(folder))


def test_a_rollback_takes_back_the_learning_rate_and_the_momentum(folder, nudged):
    nudged(
        {1: [{"lr": 0.1, "momentum": 0.5}], 3: [{"rollback": 1}], 4: [{"momentum": 0.1}]}, lr=1.0
    )
    assert column(folder, "lr") == [1, 0.1, 0.1] + [1] * 5
    assert column(folder, "momentum") == [0.9, 0.5, 0.5, 0.9] + [0.1] * 4


def test_what_comes_with_a_rollback_is_done_after_it(folder, nudged):
    nudged({1: [{"lr": 0.1}], 2: [{"momentum": 0.1}, {"lr": 0.2, "rollback": 1}]}, lr=1.0)
    assert column(folder, "lr") == [1, 0.1] + [0.2] * 5
    assert column(folder, "momentum") == [0.9] * 7


def test_a_rollback_in_the_last_epoch_goes_on(folder, nudged, capsys):
    nudged({6: [{"lr": 0.1}, {"rollback": 4}]})
    assert column(folder, "epoch") == [1, 2, 3, 4, 5, 6, 5, 6]
    assert (
        "nudge before epoch 7 refused: the run has ended after epoch 6" in capsys.readouterr().out
    )
    replay(folder)


def test_stop_and_resume(folder, nudged, capsys):
    trainer = nudged({2: [{"lr": 0.01, "stop": True}, {"lr": 0.1}]})
    assert len(trainer.history) == 2
    out = capsys.readouterr().out
    assert "nudge before epoch 3: lr 0.01, stop\n" in out
    assert "nudge before epoch 3 refused: the run has ended after epoch 2" in out
    message = f"ended after epoch 2; `fastbn train --resume {folder}` goes on with it"
    with pytest.raises(DemoError, match=message):
        send(folder, Nudge(lr=0.1))
    replay(folder)
    trainer = nudged({1: [{"rollback": 1}]}, lambda: resume(folder, {}))
    assert column(folder, "lr") == [0.003, 0.003, 0.01, *[0.003] * 5]
    assert_same_bits(replay(folder), trainer)


def test_more_epochs(folder, nudged):
    start(folder, config_for(folder, epochs=3))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(resume(folder, {}).history) == 3  # nothing is left to do
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(DemoError, match=f"`fastbn train --resume {folder} --epochs N` goes on"):
        send(folder, Nudge(lr=0.1))
    with pytest.raises(DemoError, match="--lr: cannot change on resuming"):
        resume(folder, {"lr": 0.1})
    trainer = nudged({2: [{"rollback": 3}]}, lambda: resume(folder, {"epochs": 6}))
    assert_same_bits(trainer, plain(folder))
    assert_same_bits(replay(folder), trainer)


def test_which_checkpoints_are_kept(folder, nudged, monkeypatch):
    best = 3

    def evaluate(self, examples):
        return 1.0, 0.9 if len(self.history) == best - 1 else 0.1

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    nudged({6: [{"lr": 0.1}], 7: [{"momentum": 0.5}]}, epochs=22)
    expected = {best, 6, 7, 8, *range(13, 23)}
    assert {path.name for path in folder.glob("*.npz")} == {
        checkpoint(folder, n).name for n in expected
    }
    assert len(expected) < 22
    log = log_of(folder)
    for lost in set(range(1, 23)) - expected:
        log.ended = False
        with pytest.raises(DemoError, match="expected an epoch that is kept, 0, 3, 6, 7, 8, 13,"):
            watch.check(Nudge(rollback=lost), log, folder)


def test_files_of_the_user_are_left_alone(folder):
    start(folder, config_for(folder, epochs=1))
    copies = [folder / "epoch-best.npz", folder / "notes.txt"]
    for path in copies:
        path.write_text("mine")
    resume(folder, {"epochs": 15})
    assert [path.read_text() for path in copies] == ["mine", "mine"]


def test_a_rollback_to_a_damaged_checkpoint_is_refused(folder, monkeypatch, capsys):
    train_epoch = Trainer.train_epoch

    def disturbed(self, title):
        if len(self.history) == 4:
            checkpoint(folder, 2).write_bytes(b"damaged")
            checkpoint(folder, 1).write_bytes(checkpoint(folder, 3).read_bytes())
            for epoch in (2, 1):
                send(folder, Nudge(rollback=epoch, lr=0.5))
        return train_epoch(self, title)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", disturbed)
        trainer = start(folder, config_for(folder))
    out = capsys.readouterr().out
    assert "before epoch 6 refused: --watch" in out
    assert "epoch-0002.npz: not an .npz file, or damaged\n" in out
    assert "epoch-0001.npz: not of this run, or damaged\n" in out
    refused = [event for event in log_of(folder).events if event["event"] == "refused"]
    assert [event["nudge"] for event in refused] == [
        {"rollback": 2, "lr": 0.5},
        {"rollback": 1, "lr": 0.5},
    ]
    assert_same_bits(trainer, plain(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected --lr, --momentum, --rollback or --stop, got none of them"),
        ({"lr": 0.0}, "--lr: expected a positive number, got 0.0"),
        ({"lr": float("inf")}, "--lr: expected a positive number, got inf"),
        ({"lr": float("nan")}, "--lr: expected a positive number, got nan"),
        ({"lr": "0.1"}, "--lr: expected a positive number, got '0.1'"),
        ({"momentum": 1.0}, "--momentum: expected a number from 0 to below 1, got 1.0"),
        ({"momentum": -0.5}, "--momentum: expected a number from 0 to below 1, got -0.5"),
        ({"rollback": -1}, "--rollback: expected an epoch, or 0 for the start, got -1"),
        ({"rollback": True}, "--rollback: expected an epoch, or 0 for the start, got True"),
        ({"stop": 1}, "--stop: expected True or False, got 1"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(DemoError) as caught:
        Nudge(**values)
    assert str(caught.value) == message


@pytest.fixture
def stopped(folder, nudged):
    """Return the folder of a run that a process left in the middle, without a momentum."""
    nudged({3: [{"stop": True}]}, optimizer="sgd")
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:4]))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"momentum": 0.5},
            "--momentum: expected a run with --optimizer momentum or adam, got sgd",
        ),
        ({"rollback": 4}, "--rollback: expected an epoch that is kept, 0, 1, 2, 3, got 4"),
        ({"rollback": 4, "lr": 0.1}, "--rollback: expected an epoch that is kept"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(values, message, stopped):
    with pytest.raises(DemoError, match=message):
        send(stopped, Nudge(**values))
    assert list((stopped / "nudges").iterdir()) == []


ASK = {
    "send": lambda folder: send(folder, Nudge(lr=0.1)),
    "resume": lambda folder: resume(folder, {}),
    "replay": replay,
}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
@pytest.mark.parametrize("name", ["none", ".", "blobs.npz"])
def test_no_run_there(name, ask, folder, tmp_path):
    with pytest.raises(DemoError, match=f"{tmp_path / name}: no run of `fastbn train --watch`"):
        ask(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["blobs.npz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a nudge, or damaged"),
        (b"\xff\xfe", "not a nudge, or damaged"),
        (b"[" * 100_000, "not a nudge, or damaged"),
        (b"[1]", "not a nudge, or damaged"),
        (b'{"lr": 0.1, "colour": "red"}', "not a nudge, or damaged"),
        (b'{"lr": -1.0}', "--lr: expected a positive number, got -1.0"),
        (b'{"lr": 1}', "--lr: expected a positive number, got 1"),
        (b'{"rollback": 5}', "--rollback: expected an epoch that is kept, 0, 1, 2, 3, got 5"),
        (b'{"momentum": 0.5}', "--momentum: expected a run with"),
    ],
)
def test_what_only_the_run_can_tell_is_refused_there(content, message, stopped, capsys):
    (stopped / "nudges" / "x.json").write_bytes(content)
    (stopped / "nudges" / ".y.json.1.tmp").write_bytes(b"not complete")
    trainer = resume(stopped, {})
    refused = [event for event in log_of(stopped).events if event["event"] == "refused"]
    assert [(event["id"], event["epoch"]) for event in refused] == [("x", 4)]
    assert message in refused[0]["why"]
    assert f"nudge before epoch 4 refused: {refused[0]['why']}\n" in capsys.readouterr().out
    assert {path.name for path in (stopped / "nudges").iterdir()} == {".y.json.1.tmp"}
    assert_same_bits(trainer, plain(stopped, optimizer="sgd"))


def test_a_nudge_waits_for_a_run_that_was_killed(stopped):
    assert send(stopped, Nudge(lr=0.1)) is False
    assert send(stopped, Nudge(rollback=1)) is False
    assert send(stopped, Nudge(lr=0.2)) is False
    resume(stopped, {})
    assert [str(nudge) for _, nudge, _ in log_of(stopped).marks] == [
        "lr 0.1",
        "rollback to 1",
        "lr 0.2",
    ]
    assert column(stopped, "lr") == [0.3] * 3 + [0.2] * 5


def test_a_run_that_ends_while_a_nudge_is_sent(stopped, monkeypatch):
    def ending(path, write, *, option):
        write_atomically(path, write, option=option)
        if path.parent.name == "nudges":
            log_of(stopped).add("end")

    monkeypatch.setattr(watch, "write_atomically", ending)
    with pytest.raises(DemoError, match="the run has ended after epoch 3"):
        send(stopped, Nudge(lr=0.1))
    assert list((stopped / "nudges").iterdir()) == []


def test_a_nudge_that_is_taken_just_before_the_end(stopped, monkeypatch):
    def ending(path, write, *, option):
        write_atomically(path, write, option=option)
        if path.parent.name == "nudges":
            monkeypatch.undo()
            monkeypatch.setattr(watch, "draw", lambda *_, **__: None)
            resume(stopped, {})

    monkeypatch.setattr(watch, "write_atomically", ending)
    assert send(stopped, Nudge(lr=0.1)) is False
    assert log_of(stopped).ended
    assert len(log_of(stopped).marks) == 1


def test_a_nudge_between_the_last_look_and_the_end_is_answered(stopped, monkeypatch, capsys):
    add = Log.add

    def late(self, event, **fields):
        if event == "end":
            (stopped / "nudges" / "late.json").write_text('{"rollback": 1}')
        add(self, event, **fields)

    monkeypatch.setattr(Log, "add", late)
    resume(stopped, {})
    assert (
        "nudge before epoch 7 refused: the run has ended after epoch 6" in capsys.readouterr().out
    )
    assert log_of(stopped).outcome("late") == "refused"


def test_divergence_tells_the_way_on(folder):
    with pytest.raises(DivergedError, match=f"`fastbn nudge {folder} --lr LR` and") as caught:
        start(folder, config_for(folder, optimizer="sgd", norm="none", lr=1e30))
    assert "\n" not in str(caught.value)
    send(folder, Nudge(lr=0.1))
    trainer = resume(folder, {})
    assert len(trainer.history) == 6
    assert_same_bits(replay(folder), trainer)


def test_a_nudge_that_waits_saves_a_diverging_run(folder, nudged, capsys):
    nudges = {1: [{"lr": 1e30}], 2: [{"rollback": 1}]}
    trainer = nudged(nudges, optimizer="sgd", norm="none", lr=0.1)
    assert "--lr 1e+30 is too high\nnudge before epoch 2: rollback to 1" in capsys.readouterr().out
    assert_same_bits(trainer, plain(folder, optimizer="sgd", norm="none", lr=0.1))
    assert_same_bits(replay(folder), trainer)


class KilledError(BaseException):
    """The death of a process."""


WORKS = [(train, "write_atomically"), (watch, "write_atomically"), (watch, "_delete")]


def train_and_die(folder, run, moment, nudges, monkeypatch):
    """Train, and die before or after a write or a deletion; return whether it came to that."""
    train_epoch, trained, moments = Trainer.train_epoch, count(1), count()
    works = {(at, name): getattr(at, name) for at, name in WORKS}

    def fatal(work):
        def step(*args, **options):
            if next(moments) == moment:
                raise KilledError
            work(*args, **options)
            if next(moments) == moment:
                raise KilledError

        return step

    def disturbed(self, title):
        with monkeypatch.context() as safe:  # who sends does not die
            safe.setattr(watch, "write_atomically", write_atomically)
            for nudge in nudges.get(next(trained), ()):
                send(run, Nudge(**nudge))
        return train_epoch(self, title)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", disturbed)
        for (at, name), work in works.items():
            patch.setattr(at, name, fatal(work))
        try:
            start(run, config_for(folder, epochs=3))
        except KilledError:
            return True
    return False


def test_a_death_at_any_moment_loses_nothing(folder, monkeypatch):
    nudges = {1: [{"lr": 0.1, "momentum": 0.5}, {"momentum": 0.6}], 2: [{"rollback": 1}]}
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine does not die
    for moment in count():
        run = folder.with_name(f"run{moment}")
        if not train_and_die(folder, run, moment, nudges, monkeypatch):
            break
        if not (run / "log.jsonl").exists():
            trainer, sent = start(run, config_for(folder, epochs=3)), set()
        else:
            sent = {path.stem for path in (run / "nudges").glob("*.json")}
            trainer = resume(run, {})
        taken = [event["id"] for event in log_of(run).events if "id" in event]
        assert len(set(taken)) == len(taken)
        assert sent <= set(taken)
        assert not list((run / "nudges").glob("*"))
        assert len(trainer.history) == 3
        assert_same_bits(replay(run), trainer)
    assert moment > 40
    assert len(log_of(run).marks) == 3


def test_a_death_in_the_middle_of_a_file(stopped):
    for name in ("epoch-0004.npz.123", "log.jsonl.123.4", "curves.png.123", "mine"):
        (stopped / f".{name}.tmp").write_bytes(b"incomplete")
    resume(stopped, {})
    assert [path.name for path in stopped.glob(".*")] == [".mine.tmp"]


def test_a_missing_extra(stopped, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    for ask in ASK.values():
        with pytest.raises(DemoError, match=r'filelock .*: pip install "fastbn\[demo\]"'):
            ask(stopped)
    assert list((stopped / "nudges").iterdir()) == []


def test_two_processes_nudge_at_once(folder):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastbn.demo.watch import Nudge, send\n"
        "for n in range(40):\n"
        "    assert send(Path(sys.argv[1]), Nudge(lr=float(sys.argv[2]) + n))\n"
    )
    argv = ["train", "--watch", folder, "--data", folder.parent / "blobs.npz"]
    argv += ["--hidden", "2", "--epochs", 10**6, "--lr-decay", "cosine"]
    training = subprocess.Popen(
        [sys.executable, "-m", "fastbn", *map(str, argv)], stdout=subprocess.PIPE, text=True
    )
    with training:
        assert training.stdout.readline().startswith("epoch ")
        senders = [
            subprocess.Popen([sys.executable, "-c", code, str(folder), first])
            for first in ("1000", "2000")
        ]
        assert [process.wait() for process in senders] == [0, 0]
        assert send(folder, Nudge(stop=True))
        out, _ = training.communicate()
    assert training.returncode == 0
    log = log_of(folder)
    rates = [nudge.lr for _, nudge, _ in log.marks[:-1]]
    assert Counter(rates) == Counter([*range(1000, 1040), *range(2000, 2040)])
    for first in (1000, 2000):  # each sender's own in the order in which it sent them
        own = [rate for rate in rates if first <= rate < first + 1000]
        assert own == sorted(own)
    assert len([event for event in log.events if event["event"] == "refused"]) == 0
    assert out.count("nudge before epoch") == 81
    assert list((folder / "nudges").iterdir()) == []
    assert all(later >= earlier for (earlier, *_), (later, *_) in pairwise(log.marks))


def test_one_process_trains(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE", 0.05)
    with watch._locked(stopped, "test"):
        assert send(stopped, Nudge(lr=0.1)) is True
        for name in ("resume", "replay"):
            with pytest.raises(watch.BusyError, match="another process is training there"):
                ASK[name](stopped)
    other = tmp_path / "other"
    other.mkdir()
    with watch._locked(other, "test"), pytest.raises(watch.BusyError):
        start(other, config_for(stopped))
    start(other, config_for(stopped, epochs=1))  # a lock is not in the way


def test_a_folder_with_something_in_it(stopped, tmp_path):
    before = {path: path.read_bytes() for path in stopped.glob("*.*")}
    message = f"got one with a run of 3 epochs; `fastbn train --resume {stopped}` goes on with it"
    with pytest.raises(DemoError, match=message):
        start(stopped, config_for(stopped))
    with pytest.raises(DemoError, match="expected a new or empty folder, got one with files"):
        start(tmp_path, config_for(stopped))
    with pytest.raises(DemoError, match=r"--watch .*blobs.npz: "):
        start(tmp_path / "blobs.npz", config_for(stopped))
    assert {path: path.read_bytes() for path in stopped.glob("*.*")} == before


def test_a_configuration_that_does_not_fit_leaves_no_folder(folder):
    with pytest.raises(DemoError, match="--batch-size"):
        start(folder, config_for(folder, batch_size=500))
    assert not folder.exists()


def forge(folder, number, **fields):
    """Change fields of a line of the log."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **fields})
    path.write_text("".join(f"{line}\n" for line in lines))


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
        with pytest.raises(DemoError, match="not that of `fastbn train --watch`, or damaged"):
            ask(stopped)
    assert {path: path.read_bytes() for path in stopped.glob("*.*")} == before


def test_a_truncated_log(stopped):
    path = stopped / "log.jsonl"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-30], b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(DemoError, match="or damaged"):
            resume(stopped, {})


def test_a_lost_checkpoint(stopped):
    checkpoint(stopped, 3).unlink()
    with pytest.raises(DemoError, match=r"--resume .*epoch-0003.npz: no such file"):
        resume(stopped, {})
    checkpoint(stopped, 2).replace(checkpoint(stopped, 3))
    with pytest.raises(DemoError, match=r"--resume .*epoch-0003.npz: not of this run, or damaged"):
        resume(stopped, {})


def test_a_replay_tells_the_first_epoch_that_differs(stopped):
    loss = log_of(stopped).rows[1]["loss"]
    path = checkpoint(stopped, 3)
    state = dict(np.load(path))
    about = json.loads(str(state["about"]))
    about["history"][1]["loss"] = 0.5
    np.savez(path, **{**state, "about": np.array(json.dumps(about))})
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
    message = r"network.1.weight: expected the bits of epoch-0003.npz, got others"
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
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(DemoError, match="No space left on device"):
            resume(stopped, {})
    assert_same_bits(resume(stopped, {}), plain(stopped, optimizer="sgd"))


def test_the_table_and_the_picture_are_renewed_each_epoch(folder, nudged, monkeypatch):
    seen = []

    def draw(path, trainers, **options):
        DRAW(path, trainers, **options)
        seen.append((options["marks"], list(options["undone"]), len(trainers[0].history)))

    monkeypatch.setattr(watch, "draw", draw)
    nudged({1: [{"lr": 0.01}, {"momentum": 0.5}], 3: [{"rollback": 1, "lr": 0.02}]}, epochs=3)
    with (folder / "curves.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    log = log_of(folder)
    assert [int(row["epoch"]) for row in table] == [1, 2, 3, 2, 3]
    assert [row["nudges"] for row in table] == [
        "",
        "lr 0.01; momentum 0.5",
        "",
        "rollback to 1, lr 0.02",
        "",
    ]
    assert [row["undone"] for row in table] == ["0", "1", "1", "0", "0"]
    for name in ("lr", "momentum", *train.METRICS):
        assert [float(row[name]) for row in table] == column(folder, name)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [length for *_, length in seen] == [1, 2, 3, 2, 3, 3]
    assert seen[0][:2] == ([], [])
    assert seen[2][0] == [(2, "lr 0.01\nmomentum 0.5", False)]
    marks, undone, _ = seen[-1]
    assert marks == [
        (2, "lr 0.01\nmomentum 0.5", True),
        (4, "rollback to 1\nlr 0.02", False),
    ]
    rolled_back = [{name: row[name] for name in train.METRICS} for row in log.rows[:3]]
    assert undone == [(1, rolled_back)]


def test_a_run_that_was_moved(folder, tmp_path, nudged):
    trainer = nudged({2: [{"rollback": 1}]})
    assert_same_bits(replay(folder.rename(tmp_path / "moved run")), trainer)
