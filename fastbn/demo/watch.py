"""One training babysat: curves, checkpoints and a log in a folder, nudges while it goes on.

The folder has

- ``log.jsonl``: the configuration, then every epoch, nudge, end and resumption, a line each;
- ``epoch-0007.npz``: checkpoints, as of ``train --save``; `Log.keep` tells of which epochs;
- ``curves.png`` and ``curves.csv``;
- ``nudges/``: those that wait for the start of the next epoch, a file each;
- ``lock``: held by the process that trains, and free once it is dead.

The log decides. A checkpoint is written before the line of its epoch and deleted after a line that
makes it needless, the file of a nudge is deleted after its line: a process may be killed at any
moment, and the next one finds out from the log what is done.
"""

import csv
import dataclasses
import io
import json
import math
import re
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np

from fastbn import optim
from fastbn.demo import DemoError, require
from fastbn.demo.curves import draw
from fastbn.demo.data import Data, load
from fastbn.demo.files import one_line, refusals, write_atomically
from fastbn.demo.train import (
    METRICS,
    OPTIMIZER,
    Config,
    DivergedError,
    Epoch,
    Trainer,
    decayed_lr,
    load_checkpoint,
    merge,
    one_blas_thread,
)

Event: TypeAlias = dict[str, Any]

FORMAT = "fastbn watched run 1"
LOG, LOCK = "log.jsonl", "lock"
COLUMNS = ("epoch", "lr", "momentum", *METRICS, "nudges", "undone")
RECENT = 10
PATIENCE = 1  # seconds to wait for a folder, as `send` holds it for a moment


class BusyError(DemoError):
    """Another process trains in the folder."""


@dataclass(frozen=True, kw_only=True)
class Nudge:
    """What to change before the next epoch; the rollback comes first.

    Parameters
    ----------
    rollback : int, optional
        The epoch to go back to: its parameters, running statistics, optimizer with learning rate
        and momentum, and random numbers. 0 is the start.
    lr : float, optional
        The learning rate of epoch 0, from which the decay computes that of the next epochs.
    momentum : float, optional
        Of SGD with momentum, or beta1 of Adam.
    stop : bool
        Whether to end the run.

    Raises
    ------
    DemoError
        If nothing is to be changed, or a value is out of its range.
    """

    rollback: int | None = None
    lr: float | None = None
    momentum: float | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        # A file can bring any type, as in Config.
        rollback, lr, momentum = self.rollback, self.lr, self.momentum
        valid = rollback is None or (type(rollback) is int and rollback >= 0)
        self._expect("rollback", valid, "an epoch, or 0 for the start")
        valid = lr is None or (type(lr) is float and 0 < lr < math.inf)
        self._expect("lr", valid, "a positive number")
        valid = momentum is None or (type(momentum) is float and 0 <= momentum < 1)
        self._expect("momentum", valid, "a number from 0 to below 1")
        self._expect("stop", type(self.stop) is bool, "True or False")
        if not self.changes():
            raise DemoError("expected --lr, --momentum, --rollback or --stop, got none of them")

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise DemoError(f"--{name}: expected {expected}, got {getattr(self, name)!r}")

    def changes(self) -> dict[str, Any]:
        """Return the fields that ask for something."""
        fields = dataclasses.asdict(self)
        return {name: v for name, v in fields.items() if v is not None and v is not False}

    def __str__(self) -> str:
        words = {"rollback": "rollback to {}", "stop": "stop"}
        changes = self.changes().items()
        return ", ".join(words.get(name, f"{name} {{:g}}").format(v) for name, v in changes)


class Log:
    """What happened in a run, in order, and what follows from it.

    Parameters
    ----------
    path : Path
    config : Config
        With which the run started; its ``epochs`` rise when the run is resumed with more.

    Attributes
    ----------
    events : list of dict
        The lines of the file but the first, see `add`.
    rows : list of dict
        Every epoch ever trained, for the table of the curves.
    standing : list of dict
        Those that were not rolled back: epochs 1, 2, ...
    undone : list of (int, list of Epoch)
        What each rollback took away, from the epoch on that it went back to, and its number.
    marks : list of (int, Nudge, bool)
        The nudges, before which epoch each was taken, and whether a later rollback undid it.
    pending : list of Nudge
        Those that no epoch in ``standing`` followed yet.
    ended : bool
        Whether no nudge can be taken any more.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.events: list[Event] = []
        self.rows: list[Event] = []
        self.standing: list[Event] = []
        self.undone: list[tuple[int, list[Epoch]]] = []
        self.marks: list[tuple[int, Nudge, bool]] = []
        self.pending: list[Nudge] = []
        self.ended = False
        head = {"format": FORMAT, "config": dataclasses.asdict(config)}
        self._head = head

    @classmethod
    def read(cls, folder: Path, where: str) -> Self:
        """Read the log of a folder; ``where`` begins the error messages.

        Raises
        ------
        DemoError
            If the folder has no log, or a damaged one.
        """
        path = folder / LOG
        foreign = DemoError(f"{where}: {LOG} is not that of `fastbn train --watch`, or damaged")
        try:
            head, *events = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if head["format"] != FORMAT:
                raise foreign
            saved = head["config"]
            log = cls(path, Config(**{**saved, "hidden": tuple(saved["hidden"])}))
            for event in events:
                log._follow(event)
        except (FileNotFoundError, NotADirectoryError):
            raise DemoError(f"{where}: no run of `fastbn train --watch` there") from None
        except OSError as error:
            raise DemoError(f"{where}: cannot be read: {one_line(error)}") from error
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise foreign from error
        return log

    @property
    def next_epoch(self) -> int:
        """The number of the epoch to train next."""
        return len(self.standing) + 1

    @property
    def history(self) -> list[Epoch]:
        """The standing epochs as in `Trainer.history`."""
        return [_metrics(row) for row in self.standing]

    def keep(self) -> set[int]:
        """Return the epochs whose checkpoints are kept.

        They are the last ten, the one with the best validation accuracy, and those right before
        and right after a nudge.
        """
        done = len(self.standing)
        kept = set(range(done, max(done - RECENT, 0), -1))
        for row in self.standing:
            if row["nudges"]:
                kept |= {row["epoch"] - 1, row["epoch"]}
        best = sorted(self.standing, key=lambda row: -row["validation_accuracy"])[:1]
        return kept | {row["epoch"] for row in best}

    def outcome(self, key: str) -> str | None:
        """Return "nudge" or "refused" for a nudge that was taken, else None."""
        return next((e["event"] for e in self.events if e.get("id") == key), None)

    def add(self, event: str, **fields: Any) -> None:
        """Add a line, and renew the file, whole or not at all.

        Parameters
        ----------
        event : str
            "epoch" with ``lr`` and ``momentum`` as they were in it and the `METRICS`; "nudge" with
            ``id`` and ``nudge``; "refused" with ``id``, ``nudge`` and ``why``; "end"; "resume" with
            ``epochs``. All have the number of the next epoch; "epoch" has its own.
        **fields
        """
        self._follow({"event": event, "epoch": self.next_epoch, **fields})
        self.write()

    def write(self) -> None:
        """Write the file."""
        lines = (json.dumps(line) for line in (self._head, *self.events))
        content = "".join(f"{line}\n" for line in lines).encode()
        write_atomically(self.path, lambda file: file.write(content), option="--watch")

    def _follow(self, event: Event) -> None:
        if event["epoch"] != self.next_epoch:
            raise ValueError(f"expected epoch {self.next_epoch}, got {event['epoch']!r}")
        match event["event"]:
            case "epoch":
                row = {name: event[name] for name in ("epoch", "lr", "momentum")}
                row |= {**_metrics(event), "nudges": "; ".join(map(str, self.pending)), "undone": 0}
                self.rows.append(row)
                self.standing.append(row)
                self.pending = []
            case "nudge":
                self._take(Nudge(**event["nudge"]))
            case "resume":
                self.config = dataclasses.replace(self.config, epochs=event["epochs"])
            case "refused" | "end":
                pass
            case other:
                raise ValueError(f"unknown event: {other!r}")
        if event["event"] != "refused":
            self.ended = event["event"] == "end"
        self.events.append(event)

    def _take(self, nudge: Nudge) -> None:
        epoch = self.next_epoch
        if nudge.rollback is not None:
            if nudge.rollback > len(self.standing):
                raise ValueError(f"rollback to {nudge.rollback} of {len(self.standing)} epochs")
            start = max(nudge.rollback, 1)  # the curve leaves the one that stays at this epoch
            self.undone.append((start, self.history[start - 1 :]))
            for row in self.standing[nudge.rollback :]:
                row["undone"] = 1
            del self.standing[nudge.rollback :]
            self.marks = [(e, n, undone or e > nudge.rollback) for e, n, undone in self.marks]
            self.pending = []
        self.marks.append((epoch, nudge, False))
        self.pending.append(nudge)


class Run:
    """A run in its folder.

    Parameters
    ----------
    folder : Path
    log : Log
        What happened so far.
    data : Data
        What ``load(log.config.data, log.config.data_dir)`` returns.
    option : str
        The option that named the folder, for error messages.

    Raises
    ------
    DemoError
        If the checkpoint to go on from is missing, damaged, or of another run.
    """

    def __init__(self, folder: Path, log: Log, data: Data, option: str) -> None:
        self.folder, self.log, self.data, self.option = folder, log, data, option
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
        trainer = load_checkpoint(
            path, {"epochs": config.epochs}, data=self.data, option=self.option
        )
        nudged = {name: getattr(trainer.config, name) for name in ("lr", "momentum", "beta1")}
        expected = dataclasses.replace(config, **nudged)
        if trainer.config != expected or trainer.history != self.log.history[:epoch]:
            raise DemoError(f"{self.option} {path}: not of this run, or damaged")
        return trainer

    def train(self) -> None:
        """Train to the last epoch, or until a nudge says stop.

        Raises
        ------
        DivergedError
            If the loss becomes infinite or NaN, and no nudge waits.
        DemoError
            If a file cannot be written.
        """
        with one_blas_thread():
            while not self.take() and self.log.next_epoch <= self.log.config.epochs:
                try:
                    line = self.next_epoch()
                except DivergedError as error:
                    if not _waiting(self.folder):
                        folder = shlex.quote(str(self.folder))
                        raise DivergedError(
                            f"{error}; go on from the epoch before it with `fastbn nudge {folder}"
                            f" --lr LR` and `fastbn train --resume {folder}`"
                        ) from error
                    print(error, flush=True)
                    self.trainer = self.restored()
                else:
                    self.renew()
                    print(line, flush=True)
        self.log.add("end")
        # From here on `send` finds the run ended; nudges that came just before get their answer.
        for path in _waiting(self.folder):
            self._answer(path)
        self.renew()

    def next_epoch(self) -> str:
        """Train an epoch, keep it, and return the line that tells of it."""
        line = self.trainer.next_epoch()
        self.trainer.save(checkpoint(self.folder, self.log.next_epoch), option=self.option)
        self.log.add(
            "epoch",
            lr=self.trainer.optimizer.lr,
            momentum=_momentum(self.trainer.optimizer),
            **self.trainer.history[-1],
        )
        return line

    def take(self) -> bool:
        """Take the nudges that wait, in their order, and return True after one that says stop."""
        return any(self._answer(path) for path in _waiting(self.folder))

    def nudged(self, nudge: Nudge) -> Trainer:
        """Return a trainer that goes on as a nudge says.

        Raises
        ------
        DemoError
            If it cannot; nothing is changed then.
        """
        check(nudge, self.log, self.folder)
        trainer = self.trainer if nudge.rollback is None else self.at(nudge.rollback)
        _adjust(trainer, nudge)
        return trainer

    def go_on(self, trainer: Trainer, nudge: Nudge, key: str) -> None:
        """Go on with what `nudged` returned, and log and print the nudge."""
        text = f"nudge before epoch {self.log.next_epoch}: {nudge}"
        self.log.add("nudge", id=key, nudge=nudge.changes())
        self.trainer = trainer
        done = len(trainer.history)
        if not nudge.stop and done < trainer.config.epochs:
            lr = decayed_lr(trainer.config, done)
            text += f"; epoch {done + 1} has the learning rate {lr:g}"
        print(text, flush=True)

    def renew(self) -> None:
        """Renew the picture and the table of the curves, delete what is not kept."""
        kept = {checkpoint(self.folder, epoch) for epoch in self.log.keep()}
        for path in set(self.folder.glob("epoch-*.npz")) - kept:
            if re.fullmatch(r"epoch-\d{4,}\.npz", path.name):
                _delete(path, self.option)
        marks: dict[tuple[int, bool], list[str]] = {}
        for epoch, nudge, undone in self.log.marks:
            marks.setdefault((epoch, undone), []).extend(str(nudge).split(", "))
        draw(
            self.folder / "curves.png",
            [self.trainer],
            lr=self.log.config.lr,
            marks=[(epoch, "\n".join(t), undone) for (epoch, undone), t in marks.items()],
            undone=self.log.undone,
            option=self.option,
        )
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.log.rows)
        content = text.getvalue().encode()
        path = self.folder / "curves.csv"
        write_atomically(path, lambda file: file.write(content), option=self.option)

    def _answer(self, path: Path) -> bool:
        """Honour or refuse the nudge in a file, and return whether it says stop."""
        nudge = None
        if self.log.outcome(path.stem) is None:  # else the file was about to be deleted
            try:
                nudge = _read_nudge(path)
                trainer = self.nudged(nudge)
            except DemoError as error:
                self.log.add(
                    "refused", id=path.stem, nudge=nudge and nudge.changes(), why=str(error)
                )
                print(f"nudge before epoch {self.log.next_epoch} refused: {error}", flush=True)
                nudge = None
            else:
                self.go_on(trainer, nudge, path.stem)
        _delete(path, self.option)
        return nudge is not None and nudge.stop


def start(folder: Path, config: Config) -> Trainer:
    """Train in a new folder, or an empty one, and return the trainer as it ended.

    Raises
    ------
    DivergedError
        If the loss becomes infinite or NaN.
    DemoError
        If the folder holds something or cannot be written, or for `Trainer`'s reasons.
    """
    option = "--watch"
    require("matplotlib")
    run = Run(folder, Log(folder / LOG, config), load(config.data, config.data_dir), option)
    with refusals(folder, option):
        folder.mkdir(parents=True, exist_ok=True)
        _expect_empty(folder, option)
    with _locked(folder, option):
        _expect_empty(folder, option)  # nor has another process come first
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
    option = "--resume"
    require("matplotlib")
    with _opened(folder, option) as run:
        epochs = merge(run.log.config, given, run.log.path).epochs
        if not run.log.ended or run.log.next_epoch <= epochs:
            for path in folder.glob(".*.tmp"):  # left by write_atomically in a killed process
                if re.fullmatch(r"\.(epoch-\d+|curves|log)\.\w+\.[\d.]+\.tmp", path.name):
                    _delete(path, option)
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
    option = "--replay"
    with _opened(folder, option) as run:
        log = run.log
    targets = {nudge.rollback for _, nudge, _ in log.marks}
    with tempfile.TemporaryDirectory() as name, one_blas_thread():
        scratch = Path(name)
        again = Run(scratch, Log(scratch / LOG, log.config), run.data, option)
        for event in log.events:
            if event["event"] == "epoch":
                print(again.next_epoch(), flush=True)
                for key, value in again.log.events[-1].items():
                    if value != event[key]:
                        raise DemoError(
                            f"{option} {folder}: epoch {event['epoch']}: expected {key}"
                            f" {event[key]!r} as in {LOG}, got {value!r}"
                        )
                if event["epoch"] not in targets:
                    checkpoint(scratch, event["epoch"]).unlink()
            elif event["event"] == "nudge":
                nudge = Nudge(**event["nudge"])
                again.go_on(again.nudged(nudge), nudge, event["id"])
    expected, got = run.trainer.state(), again.trainer.state()
    for key, value in expected.items():
        if not _same_bits(value, got[key]):
            path = checkpoint(folder, len(log.standing))
            raise DemoError(
                f"{option} {folder}: {key}: expected the bits of {path.name}, got others"
            )
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
    check(nudge, Log.read(folder, str(folder)), folder)
    try:
        with _locked(folder, "nudge", timeout=0):
            trains = False
    except BusyError:
        trains = True
    queue = folder / "nudges"
    with refusals(queue, "nudge"):
        queue.mkdir(exist_ok=True)
        waiting = [path.name for path in queue.iterdir()]
    # Greater than that of any nudge that has been sent; two sent at once may have the same, and
    # then differ behind it.
    numbers = (re.match(r"\d{8}(?=-)", name) for name in waiting)
    number = 1 + max((int(match[0]) for match in numbers if match), default=0)
    path = queue / f"{number:08d}-{uuid.uuid4().hex}.json"
    content = json.dumps(nudge.changes()).encode()
    write_atomically(path, lambda file: file.write(content), option="nudge")
    log = Log.read(folder, str(folder))
    if log.ended and log.outcome(path.stem) != "nudge":  # it ended in between
        path.unlink(missing_ok=True)
        check(nudge, log, folder)
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
        way = shlex.join(["fastbn", "train", "--resume", str(folder)]) + " --epochs N" * last
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
    return folder / f"epoch-{epoch:04d}.npz"


@contextmanager
def _opened(folder: Path, option: str) -> Iterator[Run]:
    """Read a run while nobody else trains it."""
    Log.read(folder, f"{option} {folder}")  # before a lock is left in a folder without a run
    with _locked(folder, option):
        log = Log.read(folder, f"{option} {folder}")
        yield Run(folder, log, load(log.config.data, log.config.data_dir), option)


@contextmanager
def _locked(folder: Path, option: str, timeout: float | None = None) -> Iterator[None]:
    """Keep other processes from training in a folder."""
    filelock = require("filelock")
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE if timeout is None else timeout)
    except filelock.Timeout as error:
        raise BusyError(f"{option} {folder}: another process is training there") from error
    except (OSError, NotImplementedError) as error:
        raise DemoError(f"{option} {folder}: cannot be locked: {one_line(error)}") from error
    try:
        yield
    finally:
        lock.release()


def _expect_empty(folder: Path, option: str) -> None:
    if (folder / LOG).exists():
        log = Log.read(folder, f"{option} {folder}")
        way = shlex.join(["fastbn", "train", "--resume", str(folder)])
        raise DemoError(
            f"{option} {folder}: expected a new or empty folder, got one with a run of"
            f" {len(log.standing)} epochs; `{way}` goes on with it"
        )
    if any(path.name != LOCK for path in folder.iterdir()):
        raise DemoError(f"{option} {folder}: expected a new or empty folder, got one with files")


def _delete(path: Path, option: str) -> None:
    with refusals(path, option):
        path.unlink(missing_ok=True)


def _waiting(folder: Path) -> list[Path]:
    """Return the files of the nudges not taken yet, in their order."""
    return sorted(path for path in (folder / "nudges").glob("*.json") if path.is_file())


def _read_nudge(path: Path) -> Nudge:
    try:
        return Nudge(**json.loads(path.read_bytes()))
    except DemoError:
        raise
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise DemoError(f"{path.name}: not a nudge, or damaged") from error


def _adjust(trainer: Trainer, nudge: Nudge) -> None:
    """Set the learning rate and the momentum."""
    if nudge.lr is not None:
        trainer.config = dataclasses.replace(trainer.config, lr=nudge.lr)
    if nudge.momentum is not None:
        match trainer.optimizer:
            case optim.Adam() as adam:
                adam.betas = nudge.momentum, adam.betas[1]
                trainer.config = dataclasses.replace(trainer.config, beta1=nudge.momentum)
            case optim.SGD() as sgd:
                sgd.momentum = nudge.momentum
                trainer.config = dataclasses.replace(trainer.config, momentum=nudge.momentum)


def _momentum(optimizer: optim.Optimizer) -> float | None:
    match optimizer:
        case optim.Adam() as adam:
            return adam.betas[0]
        case optim.SGD() as sgd:
            return sgd.momentum
        case _:
            return None


def _metrics(values: Mapping[str, Any]) -> Epoch:
    return {name: float(values[name]) for name in METRICS}


def _same_bits(one: Any, other: Any) -> bool:
    a, b = np.asarray(one), np.asarray(other)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
