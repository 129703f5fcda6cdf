"""The trials while they run: a live table on a terminal, elsewhere a line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from fastbn.demo import require
from fastbn.tune.rounds import Record, ranked
from fastbn.tune.space import Params

Update: TypeAlias = Callable[[Sequence[Record]], None]

ROWS = 8


@contextmanager
def show(trials: int) -> Iterator[Update]:
    """Return a function that shows how things stand."""
    if not require("rich.console", "tune").Console().is_terminal:
        yield _lines(trials)
        return
    before: list[int] = []  # how many trials were finished when the search was resumed
    began = time.monotonic()

    def update(records: Sequence[Record]) -> None:
        finished = sum(record.finished for record in records)
        before.append(finished)
        title = f"{finished} of {trials} trials"
        new = finished - before[0]
        if new and finished < trials:
            left = (time.monotonic() - began) / new * (trials - finished)
            title += f", about {left // 60:.0f} min {left % 60:.0f} s left"
        live.update(_table(records, title), refresh=True)

    with require("rich.live", "tune").Live(auto_refresh=False, transient=True) as live:
        yield update


def _lines(trials: int) -> Update:
    told: set[int] = set()

    def update(records: Sequence[Record]) -> None:
        for record in records:
            if record.finished and record.number not in told:
                told.add(record.number)
                print(f"{len(told):{len(str(trials))}}/{trials}  {line(record)}", flush=True)

    return update


def _table(records: Sequence[Record], title: str) -> Any:
    table = require("rich.table", "tune").Table(title=title, title_justify="left")
    running = [record for record in records if record.state == "running"]
    finished = [record for record in reversed(records) if record.finished]
    names = next((list(r.params) for r in [*running, *finished] if r.params), [])
    for heading in ("trial", "round", "state", "value", "epochs", *names):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    best = ranked(records)[:1]
    rows = {record.number: record for record in [*best, *running, *finished]}
    for record in list(rows.values())[: ROWS + len(running)]:
        state, style = ("best", "bold") if record in best else (record.state, None)
        last = record.steps[-1] if record.steps else ""
        value = last if record.value is None else record.value
        params = (record.params.get(name, "") for name in names)
        cells = (record.number, record.round, state, value, len(record.steps) or "", *params)
        table.add_row(*map(shown, cells), style=style)
    return table


def line(record: Record) -> str:
    """Return a finished trial as a line."""
    value = "" if record.value is None else f"  {record.value:.4g}"
    why = record.reason and f", {record.reason}"
    head = f"trial {record.number}  round {record.round}  {record.state}{why}"
    return f"{head}{value}  {listed(record.params)}"


def listed(params: Params) -> str:
    """Return hyper-parameters as a line."""
    return " ".join(f"{name}={shown(value)}" for name, value in params.items())


def shown(value: object) -> str:
    """Return a value with four digits at most."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
