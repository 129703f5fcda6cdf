"""The trials while they run: a live table on a terminal, elsewhere a line each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from fastbn.demo import require
from fastbn.tune.rounds import Record, ranked
from fastbn.tune.space import Params

ROWS = 8


class Show:
    """What has been shown of a search."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.told: set[int] = set()
        self.began = time.monotonic()
        self.finished_before: int | None = None
        self.live: Any = None

    def __enter__(self) -> None:
        rich = require("rich.console", "tune")
        if rich.Console().is_terminal:
            self.live = require("rich.live", "tune").Live(auto_refresh=False, transient=True)
            self.live.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def update(self, records: Sequence[Record]) -> None:
        """Show how things stand."""
        finished = [record for record in records if record.finished]
        if self.finished_before is None:  # of a study that is resumed
            self.finished_before = len(finished)
        if self.live:
            self.live.update(self._table(records, finished), refresh=True)
            return
        for record in finished:
            if record.number not in self.told:
                self.told.add(record.number)
                count = f"{len(self.told):{len(str(self.trials))}}/{self.trials}"
                print(f"{count}  {line(record)}", flush=True)

    def _table(self, records: Sequence[Record], finished: Sequence[Record]) -> Any:
        table = require("rich.table", "tune").Table(
            title=self._title(finished), title_justify="left"
        )
        running = [record for record in records if record.state == "running"]
        names = next((list(r.params) for r in [*running, *finished] if r.params), [])
        for heading in ("trial", "round", "state", "value", "epochs", *names):
            table.add_column(heading, justify="left" if heading == "state" else "right")
        best = ranked(records)[:1]
        rows = [*best, *running, *reversed(finished)]
        for row in list(dict.fromkeys(r.number for r in rows))[: ROWS + len(running)]:
            record = next(r for r in rows if r.number == row)
            value = record.steps[-1] if record.steps and record.value is None else record.value
            table.add_row(
                str(record.number),
                str(record.round),
                "best" if record in best else record.state,
                "" if value is None else f"{value:.4g}",
                str(len(record.steps) or ""),
                *(shown(record.params.get(name, "")) for name in names),
                style="bold" if record in best else None,
            )
        return table

    def _title(self, finished: Sequence[Record]) -> str:
        title = f"{len(finished)} of {self.trials} trials"
        new = len(finished) - (self.finished_before or 0)
        if new and len(finished) < self.trials:
            left = (time.monotonic() - self.began) / new * (self.trials - len(finished))
            title += f", about {left // 60:.0f} min {left % 60:.0f} s left"
        return title


def line(record: Record) -> str:
    """Return a finished trial as a line."""
    value = "" if record.value is None else f"  {record.value:.4g}"
    head = f"trial {record.number}  round {record.round}  {record.state}"
    return f"{head}{value}  {listed(record.params)}"


def listed(params: Params) -> str:
    """Return hyper-parameters as a line."""
    return " ".join(f"{name}={shown(value)}" for name, value in params.items())


def shown(value: object) -> str:
    """Return a value with four digits at most."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
