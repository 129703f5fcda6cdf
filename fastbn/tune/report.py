"""What a search found: trials as CSV, the best as JSON, importances, pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from operator import methodcaller
from pathlib import Path
from typing import Any

from fastbn.demo import require
from fastbn.demo.files import write_atomically
from fastbn.tune.rounds import Box, ranked
from fastbn.tune.search import Result
from fastbn.tune.show import shown
from fastbn.tune.space import LogUniform, OneMinusLogUniform, Params, Scale, uniform


def write(
    folder: Path, result: Result, best: Mapping[str, Any], label: str = "value"
) -> list[Path]:
    """Write all files of a report, each whole or not at all.

    Parameters
    ----------
    folder : Path
        Exists. It gets trials.csv, best.json, history.png, parallel.png, slices.png,
        importances.png and, where a scale is not linear, scales.png.
    result : Result
    best : mapping
        What goes into best.json.
    label : str
        What the objective measures.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    DemoError
        If an extra is missing or a file cannot be written.
    """
    files = []
    for name, content in _contents(result, best, label):
        files.append(folder / name)
        write_atomically(files[-1], methodcaller("write", content), option="--out")
    return files


def _contents(result: Result, best: Mapping[str, Any], label: str) -> Iterator[tuple[str, bytes]]:
    yield "trials.csv", table(result).encode()
    yield "best.json", (json.dumps(best, indent=2) + "\n").encode()
    pictures = {"history": history, "parallel": parallel, "slices": slices,
                "importances": importance_bars, "scales": why_scales}  # fmt: skip
    for name, draw in pictures.items():
        if figure := draw(result, label):
            file = io.BytesIO()
            figure.savefig(file, format="png")
            yield f"{name}.png", file.getvalue()


def table(result: Result) -> str:
    """Return all trials as CSV."""
    file = io.StringIO()
    head = ["number", "round", "state", "value", "steps", "seconds", "worker", "attempts"]
    head += [f"params_{name}" for tier in result.tiers for name in tier]
    writer = csv.DictWriter(file, head, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for r in result.trials:
        params = {f"params_{name}": value for name, value in r.params.items()}
        writer.writerow({**vars(r), **params, "steps": len(r.steps)})
    return file.getvalue()


def history(result: Result, label: str) -> Any:
    """Draw the values in the order of the trials, and the best so far."""
    figure, [axes] = _figure(1, 1, (8, 4.5))
    _points(axes, result)
    values = [r.sort_value if r.state == "complete" else math.inf for r in result.trials]
    best = list(accumulate(values, min))
    axes.step(range(len(best)), best, where="post", color="C3", label="best so far")
    axes.set(xlabel="trial", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return figure


def parallel(result: Result, label: str) -> Any:
    """Draw each trial as a line through its hyper-parameters, each on its own scale."""
    scales = result.boxes[0]
    figure, [axes] = _figure(1, 1, (2 + 1.6 * len(scales), 4.5))
    colors = require("matplotlib", "tune").colormaps["viridis"]
    order = sorted((r for r in result.trials if r.value is not None), key=lambda r: -r.sort_value)
    for rank, r in enumerate(order, 1):
        share = rank / len(order)
        _through(axes, scales, r.params, color=colors(1 - share), alpha=0.2 + 0.8 * share)
    _through(axes, scales, result.best, color="C3", linewidth=2.5,
             label=f"best: {result.value:.4g}")  # fmt: skip
    for index, scale in enumerate(scales.values()):
        axes.axvline(index, color="0.7", linewidth=0.8, zorder=0)
        for value in scale.ticks():
            axes.annotate(shown(value), (index, scale.position(value)), (4, 0),
                          textcoords="offset points", fontsize=7, va="center")  # fmt: skip
    axes.set(yticks=[], xlim=(-0.3, len(scales) - 0.4), ylim=(-0.05, 1.05),
             title=f"{label}: dark is low, light and faint is high")  # fmt: skip
    axes.grid(visible=False)
    _legend(figure, axes)
    return figure


def _through(axes: Any, scales: Box, params: Params, **style: Any) -> None:
    heights = [scale.position(params[name]) for name, scale in scales.items()]
    axes.plot(list(scales), heights, "-o", markersize=3, **style)


def slices(result: Result, label: str) -> Any:
    """Draw the values over each hyper-parameter, on its scale."""
    scales = result.boxes[0]
    columns = min(3, len(scales))
    rows = math.ceil(len(scales) / columns)
    figure, cells = _figure(rows, columns, (4 * columns, 3.2 * rows))
    for axes, (name, scale) in zip(cells, scales.items(), strict=False):
        _on_scale(axes, scale, name)
        _points(axes, result, name)
        axes.plot(scale.position(result.best[name]), result.value, "*", color="C3", markersize=12)
        axes.set_ylabel(label)
    for axes in cells[len(scales) :]:
        axes.remove()
    _legend(figure, cells[0])
    return figure


def importance_bars(result: Result, label: str) -> Any:
    """Draw the measured importances, tier by tier."""
    found = result.importances
    if not found:
        return None
    figure, [axes] = _figure(1, 1, (7, 1.5 + 0.4 * len(found)))
    for number, tier in enumerate(result.tiers, 1):
        if shares := {name: found[name] for name in tier if name in found}:
            bars = axes.barh(list(shares), list(shares.values()), label=f"tier {number}")
            axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=f"share of the order of the trials ({label})")
    axes.legend()
    return figure


def why_scales(result: Result, label: str) -> Any:  # noqa: ARG001
    """Draw where as many trials fall on a linear scale and on the scale that was used.

    None if no scale differs from a linear one.
    """
    curved = (LogUniform, OneMinusLogUniform)
    scales: dict[str, Any] = {n: s for n, s in result.boxes[0].items() if isinstance(s, curved)}
    if not scales:
        return None
    count = len(result.trials)
    few = ranked(result.trials)[: max(3, count // 10)]
    draws = [(k + 0.5) / count for k in range(count)]
    figure, cells = _figure(len(scales), 1, (7, 2.2 * len(scales)))
    for axes, (name, scale) in zip(cells, scales.items(), strict=True):
        linear = [scale.position(uniform(scale.low, scale.high).at(u)) for u in draws]
        at = [scale.position(r.params[name]) for r in few]
        ours, theirs = (sum(min(at) <= u <= max(at) for u in drawn) for drawn in (draws, linear))
        low, high = shown(scale.at(min(at))), shown(scale.at(max(at)))
        where = f"{name}: the best {len(few)} lie from {low} to {high}; there fall"
        hits = f"{ours} of {count} trials of this scale, {theirs} of a linear one"
        axes.set_title(f"{where}\n{hits}", fontsize=9)
        axes.eventplot([draws, linear], colors=["C0", "C1"], linelengths=0.6)
        axes.axvspan(min(at), max(at), color="C2", alpha=0.15, linewidth=0)
        axes.set_yticks([0, 1], ["this scale", "linear scale"])
        _on_scale(axes, scale, name)
    return figure


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, row by row."""
    # Not by pyplot, which would look for a display.
    module = require("matplotlib.figure", "tune")
    figure = module.Figure(figsize=size, dpi=120, layout="constrained")
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in cells:
        axes.grid(alpha=0.3)
    return figure, cells


def _points(axes: Any, result: Result, name: str = "") -> None:
    """Draw the values of the trials over a hyper-parameter, or over their numbers.

    Dots by round, hollow if stopped early; crosses on top if infinite.
    """
    seen = [r for r in result.trials if r.value is not None]
    scale: Any = result.boxes[0].get(name)
    for r in seen:
        x = scale.position(r.params[name]) if scale else r.number
        if math.isinf(r.sort_value):
            top = axes.get_xaxis_transform()  # 1 is the upper edge
            axes.plot(x, 0.97, "x", color="0.3", transform=top, label="infinite")
        else:
            face, more = ("none", ", stopped early") if r.state == "pruned" else (None, "")
            color, label = f"C{r.round - 1}", f"round {r.round}{more}"
            axes.plot(x, r.value, "o", color=color, markerfacecolor=face, label=label)
    if all(r.sort_value > 0 for r in seen):
        axes.set_yscale("log")


def _legend(figure: Any, axes: Any) -> None:
    """Explain what axes show, outside of them."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once, loc="outside lower center", ncols=3, fontsize=8)


def _on_scale(axes: Any, scale: Scale, name: str) -> None:
    """Let an axis run along a scale, from its position 0 to 1."""
    ticks = scale.ticks()
    axes.set_xticks([scale.position(value) for value in ticks], [shown(value) for value in ticks])
    axes.set(xlim=(-0.04, 1.04), xlabel=name)
