"""A babysat run: nudges and rollbacks, what is kept, replay to the same bits."""

import csv

import pytest
from demo_cases import assert_same_bits
from demo_runs import column, config_for, disturb, log_of, plain
from support import write_blobs

from fastbn import optim
from fastbn.demo import DemoError, train, watch
from fastbn.demo import config as demo_config
from fastbn.demo.data import load
from fastbn.demo.log import Nudge
from fastbn.demo.train import DivergedError, Trainer, decayed_lr
from fastbn.demo.watch import checkpoint, replay, resume, send, start

DRAW = watch.draw


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


def test_without_a_nudge_it_is_a_training_as_any_other(folder, tmp_path, capsys):
    saved = tmp_path / "saved.safetensors"
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
    has_momentum = given["optimizer"] in demo_config.OPTIMIZER
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


@pytest.mark.parametrize("lr_decay", demo_config.CHOICES["lr_decay"])
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
    message = f"ended after epoch 2; `fastbn resume {folder}` goes on with it"
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
    with pytest.raises(DemoError, match=f"`fastbn resume {folder} --epochs N` goes on"):
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
    assert {path.name for path in folder.glob("*.safetensors")} == {
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
    copies = [folder / "epoch-best.safetensors", folder / "notes.txt"]
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
    assert f"before epoch 6 refused: {folder}" in out
    assert "epoch-0002.safetensors: not a checkpoint of `fastbn train --save`, or damaged\n" in out
    assert "epoch-0001.safetensors: not of this run, or damaged\n" in out
    refused = [event for event in log_of(folder).events if event["event"] == "refused"]
    assert [event["nudge"] for event in refused] == [
        {"rollback": 2, "lr": 0.5},
        {"rollback": 1, "lr": 0.5},
    ]
    assert_same_bits(trainer, plain(folder))


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
