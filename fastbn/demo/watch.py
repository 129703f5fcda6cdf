"""One training babysat: curves, checkpoints and a log in a folder, nudges while it goes on.

The folder has

- ``log.jsonl``: the configuration, then every epoch, nudge, end and resumption, a line each;
- ``epoch-0007.safetensors``: checkpoints, as of ``train --save``; `Log.keep` tells of which epochs;
- ``curves.png`` and ``curves.csv``;
- ``nudges.jsonl``: all nudges, a line each; the first ``Log.answered`` of them are done;
- ``lock`` and ``nudges.lock``: held by the process that trains, and by those that read or write
  nudges. Both are free once the process is dead.

The log decides. A checkpoint is written before the line of its epoch and deleted after a line that
makes it needless: a process may be killed at any moment, and the next one finds out from the log
what is done.
"""

import csv
import dataclasses
import io
import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastbn.demo import DemoError, require
from fastbn.demo.checkpoint import load_checkpoint, merge
from fastbn.demo.config import OPTIMIZER, Config
from fastbn.demo.curves import check_drawing, draw
from fastbn.demo.data import load
from fastbn.demo.files import one_line, refusals
from fastbn.demo.log import NAME, Log, Nudge, write_text
from fastbn.demo.train import (
    METRICS,
    DivergedError,
    Trainer,
    decayed_lr,
    one_blas_thread,
    optimizer_options,
)

COLUMNS = ("epoch", "lr", "momentum", *METRICS, "nudges", "undone")
# What `write_atomically` leaves in a process that is killed, and what goes with each epoch.
TEMPORARY = re.compile(r"\.(epoch-\d+|curves|log)\.\w+\.[\da-f.]+\.tmp")
DELETED = re.compile(rf"epoch-\d{{4,}}\.safetensors|{TEMPORARY.pattern}")
PATIENCE = 1  # seconds to wait for a folder, as `send` holds it for a moment


class BusyError(DemoError):
    """Another process trains in the folder."""


class Run:
    """A run in its folder.

    Parameters
    ----------
    folder : Path
    log : Log
        What happened so far.

    Raises
    ------
    DemoError
        If the checkpoint to go on from is missing, damaged, or of another run.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        self.folder, self.log = folder, log
        self.data = load(log.config.data, log.config.data_dir)
        self.trainer = self.restored()

    def restored(self) -> Trainer:
        """Return a trainer that goes on where the log ends."""
        trainer = self.at(len(self.log.standing))
        for nudge in self.log.pending:
            _adjust(trainer, nudge)
        return trainer

    def at(self, epoch: int) -> Trainer:
        """Return a trainer as it was after an epoch."""
        config = self.log.config
        if epoch == 0:
            return Trainer(config, self.data)
        path = checkpoint(self.folder, epoch)
        trainer = load_checkpoint(path, {"epochs": config.epochs}, self.data)
        nudged = {name: getattr(trainer.config, name) for name in ("lr", "momentum", "beta1")}
        expected = dataclasses.replace(config, **nudged)
        if trainer.config != expected or trainer.history != self.log.history[:epoch]:
            raise DemoError(f"{path}: not of this run, or damaged")
        return trainer

    def train(self) -> None:
        """Train to the last epoch, or until a nudge says stop.

        Raises
        ------
        DivergedError
            If the loss becomes infinite or NaN, and no nudge waits.
        """
        with one_blas_thread():
            while not self.ends():
                try:
                    line = self.next_epoch()
                except DivergedError as error:
                    if not self.waiting():
                        folder = shlex.quote(str(self.folder))
                        raise DivergedError(
                            f"{error}; go on from the epoch before it with `fastbn nudge {folder}"
                            f" --lr LR` and `fastbn resume {folder}`"
                        ) from error
                    line = str(error)
                    self.trainer = self.restored()
                self.renew()
                print(line, flush=True)
        self.renew()

    def next_epoch(self) -> str:
        """Train an epoch, keep it, and return the line that tells of it."""
        line = self.trainer.next_epoch()
        self.trainer.save(checkpoint(self.folder, self.log.next_epoch))
        config = self.trainer.config
        momentum = {"adam": config.beta1, "rmsprop": None}
        self.log.add(
            "epoch",
            lr=self.trainer.optimizer.lr,
            momentum=momentum.get(config.optimizer, config.momentum or 0.0),
            **self.trainer.history[-1],
        )
        return line

    def ends(self) -> bool:
        """Answer the nudges that wait; after the last epoch, or one that says stop, log the end."""
        with _locked(self.folder / "nudges.lock"):  # none comes in between the look and the end
            stop = any(map(self.answer, self.waiting()))
            if stop or self.log.next_epoch > self.log.config.epochs:
                self.log.add("end")
                for line in self.waiting():
                    self.answer(line)  # refused, as the run has ended
            return self.log.ended

    def waiting(self) -> list[bytes]:
        """Return the nudges that were not answered yet."""
        return _nudges(self.folder)[self.log.answered :]

    def answer(self, line: bytes) -> bool:
        """Take or refuse a nudge, and return whether the run stops."""
        nudge = None
        try:
            nudge = Nudge.read(line)
            self.take(nudge)
        except DemoError as error:
            self.log.add("refused", nudge=nudge and nudge.changes(), why=str(error))
            print(f"nudge before epoch {self.log.next_epoch} refused: {error}", flush=True)
            return False
        return nudge.stop

    def take(self, nudge: Nudge) -> None:
        """Go on as a nudge says; log and print it.

        Raises
        ------
        DemoError
            If it cannot be done; nothing is changed then.
        """
        check(nudge, self.log, self.folder)
        trainer = self.trainer if nudge.rollback is None else self.at(nudge.rollback)
        _adjust(trainer, nudge)
        text = f"nudge before epoch {self.log.next_epoch}: {nudge}"
        self.log.add("nudge", nudge=nudge.changes())
        self.trainer = trainer
        done = len(trainer.history)
        if not nudge.stop and done < trainer.config.epochs:
            lr = decayed_lr(trainer.config, done)
            text += f"; epoch {done + 1} has the learning rate {lr:g}"
        print(text, flush=True)

    def renew(self) -> None:
        """Renew the picture and the table of the curves, delete what is not kept."""
        kept = {checkpoint(self.folder, epoch) for epoch in self.log.keep()}
        marks: dict[tuple[int, bool], list[str]] = {}
        for epoch, nudge, undone in self.log.marks:
            marks.setdefault((epoch, undone), []).extend(str(nudge).split(", "))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.log.rows)
        with refusals(self.folder):
            for path in {*self.folder.iterdir()} - kept:
                if DELETED.fullmatch(path.name):
                    path.unlink()
            draw(
                self.folder / "curves.png",
                [self.trainer],
                lr=self.log.config.lr,
                marks=[(epoch, "\n".join(t), undone) for (epoch, undone), t in marks.items()],
                undone=self.log.undone,
            )
        write_text(self.folder / "curves.csv", text.getvalue())


def start(folder: Path, config: Config) -> Trainer:
    """Train in a new folder, or an empty one, and return the trainer as it ended.

    Raises
    ------
    DivergedError
        If the loss becomes infinite or NaN.
    DemoError
        If the folder holds something or cannot be written, or for `Trainer`'s reasons.
    """
    _require_all()
    run = Run(folder, Log(folder / NAME, config))
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _expect_empty(folder)
    with _locked(folder / "lock", PATIENCE):
        _expect_empty(folder)  # another process may have come first
        run.log.write()
        run.train()
    return run.trainer


def resume(folder: Path, given: Mapping[str, Any]) -> Trainer:
    """Go on with a run that was killed, stopped or has more epochs now, and return the trainer.

    Parameters
    ----------
    folder : Path
    given : mapping
        As in `load_checkpoint`.

    Raises
    ------
    DivergedError
        If the loss becomes infinite or NaN.
    DemoError
        If there is no run, another process trains it, a file is damaged or cannot be written, or
        another configuration is asked for.
    """
    _require_all()
    with _opened(folder) as run:
        epochs = merge(run.log.config, given, run.log.path).epochs
        if not run.log.ended or run.log.next_epoch <= epochs:
            run.log.add("resume", epochs=epochs)
            run.trainer.config = dataclasses.replace(run.trainer.config, epochs=epochs)
            run.train()
    return run.trainer


def replay(folder: Path) -> Trainer:
    """Train a run again from its log alone, compare every bit, and return the new trainer.

    Raises
    ------
    DemoError
        If an epoch of the log, or the state with which the run would go on, has other bits; if
        there is no run, a process trains it, or a file is damaged.
    """
    with _opened(folder) as run:
        log = run.log
    targets = {nudge.rollback for _, nudge, _ in log.marks}
    with tempfile.TemporaryDirectory() as scratch, one_blas_thread():
        again = Run(Path(scratch), Log(Path(scratch) / NAME, log.config))
        for event in log.events:
            epoch = event["epoch"]
            if event["event"] == "epoch":
                print(again.next_epoch(), flush=True)
                for key, value in again.log.events[-1].items():
                    if value != event[key]:
                        raise DemoError(
                            f"{folder}: epoch {epoch}: expected {key} {event[key]!r} as in {NAME},"
                            f" got {value!r}"
                        )
                if epoch not in targets:
                    checkpoint(again.folder, epoch).unlink()
            elif event["event"] == "nudge":
                again.take(Nudge(**event["nudge"]))
    expected, got = _states(run.trainer), _states(again.trainer)
    for key, value in expected.items():
        if not _same_bits(value, got[key]):
            path = checkpoint(folder, len(log.standing))
            raise DemoError(f"{folder}: {key}: expected the bits of {path.name}, got others")
    print(f"the same bits: {len(log.rows)} epochs, {len(log.marks)} nudges")
    return again.trainer


def send(folder: Path, nudge: Nudge) -> bool:
    """Leave a nudge for a run, and return whether a process trains it now.

    Any number of processes may send at once. Nudges are taken in the order in which they were sent,
    each once.

    Raises
    ------
    DemoError
        If there is no run, it has ended, or it cannot do what the nudge says.
    """
    Log.read(folder)  # fails where there is no run, before a lock is left there
    try:
        with _locked(folder / "lock", timeout=0):
            trains = False
    except BusyError:
        trains = True
    with _locked(folder / "nudges.lock"):
        log = Log.read(folder)
        check(nudge, log, folder)
        lines = [line.decode(errors="replace") for line in _nudges(folder)]
        # Where the file was lost, empty lines stand for the nudges that were answered.
        lines += [""] * (log.answered - len(lines))
        text = "\n".join([*lines, json.dumps(nudge.changes()), ""])
        write_text(folder / "nudges.jsonl", text)
    return trains


def check(nudge: Nudge, log: Log, folder: Path) -> None:
    """Find out whether a run can do what a nudge says.

    Raises
    ------
    DemoError
        If it cannot.
    """
    config, done = log.config, len(log.standing)
    last = done >= config.epochs
    if log.ended or (last and nudge.rollback is None and not nudge.stop):
        way = shlex.join(["fastbn", "resume", str(folder)]) + " --epochs N" * last
        raise DemoError(f"the run has ended after epoch {done}; `{way}` goes on with it")
    if nudge.momentum is not None and config.optimizer not in OPTIMIZER:
        expected = " or ".join(OPTIMIZER)
        raise DemoError(
            f"--momentum: expected a run with --optimizer {expected}, got {config.optimizer}"
        )
    if nudge.rollback is not None:
        kept = [0, *(n for n in range(1, done + 1) if checkpoint(folder, n).is_file())]
        if nudge.rollback not in kept:
            raise DemoError(
                f"--rollback: expected an epoch that is kept, {', '.join(map(str, kept))},"
                f" got {nudge.rollback}"
            )


def checkpoint(folder: Path, epoch: int) -> Path:
    """Return where the checkpoint of an epoch lies."""
    return folder / f"epoch-{epoch:04d}.safetensors"


@contextmanager
def _opened(folder: Path) -> Iterator[Run]:
    """Read a run while nobody else trains it."""
    Log.read(folder)  # fails where there is no run, before a lock is left there
    with _locked(folder / "lock", PATIENCE):
        yield Run(folder, Log.read(folder))


def _locked(path: Path, timeout: float = -1) -> AbstractContextManager[Any]:
    """Keep other processes out of what a lock file protects."""
    filelock = require("filelock")
    lock = filelock.FileLock(path)
    try:
        held: AbstractContextManager[Any] = lock.acquire(timeout, poll_interval=0.01)
    except filelock.Timeout as error:
        raise BusyError(f"{path.parent}: another process is training there") from error
    except (OSError, NotImplementedError) as error:
        raise DemoError(f"{path}: cannot be locked: {one_line(error)}") from error
    return held


def _expect_empty(folder: Path) -> None:
    expected = f"{folder}: expected a new or empty folder, got one with"
    if (folder / NAME).exists():
        done = len(Log.read(folder).standing)
        way = shlex.join(["fastbn", "resume", str(folder)])
        raise DemoError(f"{expected} a run of {done} epochs; `{way}` goes on with it")
    if any(path.name != "lock" and not TEMPORARY.fullmatch(path.name) for path in folder.iterdir()):
        raise DemoError(f"{expected} files")


def _require_all() -> None:
    check_drawing()
    require("safetensors", extra="io")


def _nudges(folder: Path) -> list[bytes]:
    path = folder / "nudges.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def _adjust(trainer: Trainer, nudge: Nudge) -> None:
    """Set the learning rate and the momentum."""
    momentum = "beta1" if trainer.config.optimizer == "adam" else "momentum"
    wanted = {"lr": nudge.lr, momentum: nudge.momentum}
    changes: dict[str, Any] = {name: v for name, v in wanted.items() if v is not None}
    trainer.config = dataclasses.replace(trainer.config, **changes)
    for name, value in optimizer_options(trainer.config).items():
        setattr(trainer.optimizer, name, value)


def _states(trainer: Trainer) -> dict[str, Any]:
    parts = trainer.parts().items()
    return {f"{name}.{key}": v for name, part in parts for key, v in part.state_dict().items()}


def _same_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, np.ndarray):
        return bool(one == other)
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
