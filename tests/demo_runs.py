"""What the tests of babysat runs share: short runs, and what their logs tell."""

from itertools import count

import pytest

from fastbn.demo import watch
from fastbn.demo.config import configure
from fastbn.demo.data import load
from fastbn.demo.log import Log, Nudge
from fastbn.demo.train import Trainer

for module in ("filelock", "matplotlib", "safetensors", "threadpoolctl", "tqdm"):
    pytest.importorskip(module)

QUICK = {"hidden": (8,), "epochs": 6, "lr_decay": "none"}
ASK = {
    "send": lambda folder: watch.send(folder, Nudge(lr=0.1)),
    "resume": lambda folder: watch.resume(folder, {}),
    "replay": watch.replay,
}


def config_for(folder, **given):
    return configure({**QUICK, "data": str(folder.parent / "blobs.npz"), **given})


def disturb(patch, folder, nudges):
    """Let nudges arrive during the first, second, ... epoch that is trained."""
    train_epoch, trained = Trainer.train_epoch, count(1)

    def disturbed(self, title):
        for nudge in nudges.get(next(trained), ()):
            watch.send(folder, Nudge(**nudge))
        return train_epoch(self, title)

    patch.setattr(Trainer, "train_epoch", disturbed)


def stop_after_3(folder, patch):
    """Leave a run as a process does that dies in the middle; it has no momentum."""
    disturb(patch, folder, {3: [{"stop": True}]})
    watch.start(folder, config_for(folder, optimizer="sgd"))
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:4]))
    (folder / "nudges.jsonl").unlink()


def log_of(folder):
    return Log.read(folder)


def column(folder, name):
    return [row[name] for row in log_of(folder).rows]


def plain(folder, **given):
    """Train without a folder."""
    config = config_for(folder, **given)
    trainer = Trainer(config, load(config.data))
    trainer.run()
    return trainer
