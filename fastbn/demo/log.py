"""The log of a babysat run, and the nudges that it takes."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from fastbn.demo import DemoError
from fastbn.demo.config import BELOW_1, FLAG, POSITIVE, Config, integer, obey
from fastbn.demo.files import one_line, refusals
from fastbn.demo.train import METRICS, Epoch
from fastbn.files import write_atomically

Event: TypeAlias = dict[str, Any]

FORMAT = "fastbn watched run 2"
NAME = "log.jsonl"
RECENT = 10
RULES = {
    "rollback": integer(0, "an epoch, or 0 for the start"),
    "lr": POSITIVE,
    "momentum": (BELOW_1[0], "a number from 0 to below 1"),
    "stop": FLAG,
}


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
        values = vars(self)
        obey(values, **{n: rule for n, rule in RULES.items() if values[n] is not None})
        if not self.changes():
            raise DemoError("expected --lr, --momentum, --rollback or --stop, got none of them")

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """Read what ``json.dumps(nudge.changes())`` wrote."""
        try:
            return cls(**json.loads(text))
        except DemoError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise DemoError("not a nudge, or damaged") from error

    def changes(self) -> dict[str, Any]:
        """Return the fields that ask for something."""
        return {name: v for name, v in vars(self).items() if v is not None and v is not False}

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
        The lines of the file but the first; see `add`.
    rows : list of dict
        Every epoch ever trained, for the table of the curves.
    standing : list of dict
        Those that were not rolled back: epochs 1, 2, ...
    undone : list of (int, list of Epoch)
        For each rollback, the number of the epoch that it went back to, and the epochs from there
        on that it took away.
    marks : list of (int, Nudge, bool)
        The nudges, before which epoch each was taken, and whether a later rollback undid it.
    pending : list of Nudge
        Those that no epoch has followed yet.
    answered : int
        How many nudges were taken or refused.
    ended : bool
        Whether no nudge can be taken any more.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.head = {"format": FORMAT, "config": dataclasses.asdict(config)}
        self.events: list[Event] = []
        self.rows: list[Event] = []
        self.standing: list[Event] = []
        self.undone: list[tuple[int, list[Epoch]]] = []
        self.marks: list[tuple[int, Nudge, bool]] = []
        self.pending: list[Nudge] = []
        self.answered = 0
        self.ended = False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the log of a folder.

        Raises
        ------
        DemoError
            If the folder has no log, or a damaged one.
        """
        foreign = f"{folder}: {NAME} is not that of `fastbn watch`, or damaged"
        try:
            text = (folder / NAME).read_text(encoding="utf-8")
            head, *events = map(json.loads, text.splitlines())
            if (written := str(head["format"])) != FORMAT:
                if written.startswith(FORMAT[:-1]):
                    foreign = f"{folder}: expected a {FORMAT}, got a {written}, of another version"
                raise ValueError(written)
            config = {**head["config"], "hidden": tuple(head["config"]["hidden"])}
            log = cls(folder / NAME, Config(**config))
            for event in events:
                log._follow(event)
        except (FileNotFoundError, NotADirectoryError):
            raise DemoError(f"{folder}: no run of `fastbn watch` there") from None
        except OSError as error:
            raise DemoError(f"{folder}: cannot be read: {one_line(error)}") from error
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DemoError(foreign) from error
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
        last, nudged = self.standing[-RECENT:], [row for row in self.standing if row["nudges"]]
        best = sorted(self.standing, key=lambda row: -row["validation_accuracy"])[:1]
        kept = {row["epoch"] for row in [*last, *nudged, *best]}
        return kept | {row["epoch"] - 1 for row in nudged}

    def add(self, event: str, **fields: Any) -> None:
        """Add a line, and renew the file, whole or not at all.

        Parameters
        ----------
        event : str
            "epoch" with ``lr`` and ``momentum`` as they were in it and the `METRICS`; "nudge" with
            ``nudge``; "refused" with ``nudge`` and ``why``; "end"; "resume" with ``epochs``. All
            have the number of the next epoch; "epoch" has its own.
        **fields
        """
        self._follow({"event": event, "epoch": self.next_epoch, **fields})
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_text(
            self.path, "".join(f"{json.dumps(event)}\n" for event in [self.head, *self.events])
        )

    def _follow(self, event: Event) -> None:
        if event["epoch"] != self.next_epoch:
            raise ValueError(f"expected epoch {self.next_epoch}, got {event['epoch']!r}")
        kind = event["event"]
        if kind == "epoch":
            row = {name: event[name] for name in ("epoch", "lr", "momentum")}
            row |= {**_metrics(event), "nudges": "; ".join(map(str, self.pending)), "undone": 0}
            self.rows.append(row)
            self.standing.append(row)
            self.pending = []
        elif kind == "nudge":
            self._take(Nudge(**event["nudge"]))
        elif kind == "resume":
            self.config = dataclasses.replace(self.config, epochs=event["epochs"])
        elif kind not in ("refused", "end"):
            raise ValueError(f"unknown event: {kind!r}")
        self.answered += kind in ("nudge", "refused")
        self.ended = kind == "end" or (kind == "refused" and self.ended)
        self.events.append(event)

    def _take(self, nudge: Nudge) -> None:
        epoch, back = self.next_epoch, nudge.rollback
        if back is not None:
            if back > len(self.standing):
                raise ValueError(f"rollback to {back} of {len(self.standing)} epochs")
            start = max(back, 1)  # the curve leaves the one that stays at this epoch
            self.undone.append((start, self.history[start - 1 :]))
            for row in self.standing[back:]:
                row["undone"] = 1
            del self.standing[back:]
            self.marks = [(e, n, undone or e > back) for e, n, undone in self.marks]
            self.pending = []
        self.marks.append((epoch, nudge, False))
        self.pending.append(nudge)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with refusals(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def _metrics(values: Mapping[str, Any]) -> Epoch:
    return {name: float(values[name]) for name in METRICS}
