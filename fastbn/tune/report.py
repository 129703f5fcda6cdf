"""What a search found: trials as CSV, the best as JSON, importances, pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbn.demo import require
from fastbn.demo.files import write_atomically
from fastbn.tune.rounds import Record, ranked
from fastbn.tune.search import Result
from fastbn.tune.show import shown
from fastbn.tune.space import Choice, LogUniform, OneMinusLogUniform, Scale

OPTION = "--out"  # named in errors


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
    files = [folder / "trials.csv", folder / "best.json"]
    text = json.dumps(best, indent=2) + "\n"
    write_atomically(files[0], lambda file: file.write(table(result).encode()), option=OPTION)
    write_atomically(files[1], lambda file: file.write(text.encode()), option=OPTION)
    pictures: dict[str, Callable[[Result, str], Any]] = {
        "history": history, "parallel": parallel, "slices": slices, "importances": importance_bars,
        "scales": why_scales,
    }  # fmt: skip
    for name, draw in pictures.items():
        figure = draw(result, label)
        if figure:
            files.append(folder / f"{name}.png")
            save = _saver(figure)
            write_atomically(files[-1], save, option=OPTION)
    return files


def _saver(figure: Any) -> Callable[[Any], object]:
    return lambda file: figure.savefig(file, format="png")


def table(result: Result) -> str:
    """Return all trials as CSV."""
    file = io.StringIO()
    names = _names(result)
    writer = csv.writer(file, lineterminator="\n")
    head = ("number", "round", "state", "value", "steps", "seconds", "worker", "attempts")
    writer.writerow([*head, *(f"params_{name}" for name in names)])
    for r in result.trials:
        row = r.number, r.round, r.state, r.value, len(r.steps), r.seconds, r.worker, r.attempts
        writer.writerow([*row, *(r.params.get(name) for name in names)])
    return file.getvalue()


def history(result: Result, label: str) -> Any:
    """Draw the values in the order of the trials, and the best so far."""
    figure, [[axes]] = _figure(1, 1, (8, 4.5))
    best, line = math.inf, []
    for r in result.trials:
        if r.state == "complete":
            best = min(best, r.sort_value)
        line.append(best)
    _points(axes, result)
    numbers = [r.number for r in result.trials]
    axes.step(numbers, line, where="post", color="C3", label="best so far")
    for each in {r.round: r.number for r in reversed(result.trials) if r.round > 1}.values():
        axes.axvline(each - 0.5, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="trial (dotted: a new round)", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return figure


def parallel(result: Result, label: str) -> Any:
    """Draw each trial as a line through its hyper-parameters, each on its own scale."""
    scales = _tuned(result)
    figure, [[axes]] = _figure(1, 1, (2 + 1.6 * len(scales), 4.5))
    seen = [r for r in result.trials if r.value is not None]
    order = sorted(seen, key=lambda r: r.sort_value)
    colors = require("matplotlib", "tune").colormaps["viridis"]
    at = range(len(scales))
    for rank, r in reversed(list(enumerate(order))):
        heights = [scale.position(r.params[name]) for name, scale in scales.items()]
        share = rank / max(len(order) - 1, 1)
        axes.plot(at, heights, "-o", color=colors(share), alpha=1 - 0.8 * share,
                  markersize=3, linewidth=1.2)  # fmt: skip
    heights = [scale.position(result.best[name]) for name, scale in scales.items()]
    axes.plot(at, heights, "-o", color="C3", linewidth=2.5, label=f"best: {result.value:.4g}")
    for index, scale in enumerate(scales.values()):
        axes.axvline(index, color="0.7", linewidth=0.8, zorder=0)
        for value in scale.ticks():
            axes.annotate(shown(value), (index, scale.position(value)), (4, 0),
                          textcoords="offset points", fontsize=7, va="center")  # fmt: skip
    axes.set(yticks=[], xlim=(-0.3, len(scales) - 0.4), ylim=(-0.05, 1.05),
             title=f"{label}: dark is low, light and faint is high")  # fmt: skip
    axes.set_xticks(list(at), list(scales))
    axes.grid(visible=False)
    _legend(figure, axes)
    return figure


def slices(result: Result, label: str) -> Any:
    """Draw the values over each hyper-parameter, on its scale, and where the rounds searched."""
    scales = _tuned(result)
    columns = min(3, len(scales))
    rows = math.ceil(len(scales) / columns)
    figure, grid = _figure(rows, columns, (4 * columns, 3.2 * rows))
    cells = [axes for row in grid for axes in row]
    for axes, (name, scale) in zip(cells, scales.items(), strict=False):
        _on_scale(axes, scale)
        _points(axes, result, name)
        for box in result.boxes[1:]:
            for low, high in _spans(scale, box[name]):
                axes.axvspan(low, high, color="C1", alpha=0.1, linewidth=0)
        axes.plot(scale.position(result.best[name]), result.value, "*", color="C3", markersize=12)
        axes.set(xlabel=name, ylabel=label)
    for axes in cells[len(scales) :]:
        axes.remove()
    _legend(figure, cells[0])
    return figure


def importance_bars(result: Result, label: str) -> Any:
    """Draw the measured importances beside the tiers of the space."""
    found = result.importances
    if not found:
        return None
    tiers = {name: index for index, tier in enumerate(result.tiers, 1) for name in tier}
    figure, [[axes]] = _figure(1, 1, (7, 1.5 + 0.4 * len(found)))
    names = sorted(found, key=lambda name: found[name])
    axes.barh(names, [found[n] for n in names], color=[f"C{tiers[n] - 1}" for n in names])
    for name in names:
        axes.annotate(f"{found[name]:.2f}", (found[name], name), (3, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    patch = require("matplotlib.patches", "tune").Patch
    shown_tiers = sorted({tiers[name] for name in names})
    axes.legend(handles=[patch(color=f"C{t - 1}", label=f"tier {t}") for t in shown_tiers])
    axes.set(
        xlabel=f"share of the order of the trials ({label})", xlim=(0, 1.1 * max(found.values()))
    )
    return figure


def why_scales(result: Result, label: str) -> Any:
    """Draw where as many trials fall on a linear scale and on the scale that was used.

    None if no scale differs from a linear one.
    """
    scales: dict[str, Any] = {
        name: scale
        for name, scale in _tuned(result).items()
        if isinstance(scale, LogUniform | OneMinusLogUniform)
    }
    if not scales:
        return None
    count = len(result.trials)
    few = ranked(result.trials)[: max(3, count // 10)]
    figure, grid = _figure(
        2, len(scales), (5 * len(scales), 5.5), sharex="col", height_ratios=(1, 3)
    )
    draws = [(k + 0.5) / count for k in range(count)]
    for (name, scale), above, below in zip(scales.items(), grid[0], grid[1], strict=True):
        width = scale.high - scale.low
        linear = [scale.position(scale.low + u * width) for u in draws]
        above.plot(linear, [1] * count, "|", color="C1", markersize=14)
        above.plot(draws, [0] * count, "|", color="C0", markersize=14)
        above.set_yticks([0, 1], ["this scale", "linear scale"])
        above.set(ylim=(-0.6, 1.6))
        start, end = (side(scale.position(r.params[name]) for r in few) for side in (min, max))
        hits = [sum(start <= u <= end for u in drawn) for drawn in (draws, linear)]
        low, high = shown(scale.at(start)), shown(scale.at(end))
        above.set_title(
            f"{name}: the best {len(few)} lie from {low} to {high}; there fall\n"
            f"{hits[0]} of {count} trials of this scale, {hits[1]} of a linear one",
            fontsize=9,
        )
        for axes in (above, below):
            axes.axvspan(start, end, color="C2", alpha=0.15, linewidth=0)
        _on_scale(below, scale)
        _points(below, result, name)
        below.set(xlabel=name, ylabel=label)
        above.tick_params(labelbottom=False)
    _legend(figure, grid[1][0])
    return figure


def _names(result: Result) -> list[str]:
    return [name for tier in result.tiers for name in tier]


def _tuned(result: Result) -> dict[str, Scale]:
    return {n: s for tier in result.tiers for n, s in tier.items() if n in result.boxes[0]}


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """Return a figure and its axes, row by row."""
    # Not by pyplot, which would look for a display.
    figure = require("matplotlib.figure", "tune").Figure(
        figsize=size, dpi=120, layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid


def _points(axes: Any, result: Result, name: str = "") -> None:
    """Draw the values of the trials over a hyper-parameter, or over their numbers.

    Dots by round, hollow if stopped early; crosses on top if infinite.
    """
    scales = _tuned(result)

    def x(record: Record) -> float:
        return scales[name].position(record.params[name]) if name else record.number

    finite = [r for r in result.trials if r.value is not None and math.isfinite(r.value)]
    for number in range(1, len(result.boxes) + 1):
        for state, face in (("complete", f"C{number - 1}"), ("pruned", "none")):
            chosen = [r for r in finite if (r.round, r.state) == (number, state)]
            if chosen:
                label = f"round {number}" + (", stopped early" if state == "pruned" else "")
                axes.scatter([x(r) for r in chosen], [r.value for r in chosen], s=22,
                             facecolors=face, edgecolors=f"C{number - 1}", label=label)  # fmt: skip
    infinite = [r for r in result.trials if r.value is not None and math.isinf(r.value)]
    if all(r.value is not None and r.value > 0 for r in finite):
        axes.set_yscale("log")
    if infinite:
        at, top = [x(r) for r in infinite], axes.get_xaxis_transform()  # 1 is the upper edge
        axes.scatter(at, [0.97] * len(at), s=22, marker="x", color="0.3", transform=top,
                     label="infinite")  # fmt: skip


def _legend(figure: Any, axes: Any) -> None:
    """Explain what axes show, outside of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def _on_scale(axes: Any, scale: Scale) -> None:
    """Let an axis run along a scale, from its position 0 to 1."""
    ticks = scale.ticks()
    axes.set_xticks([scale.position(value) for value in ticks], [shown(value) for value in ticks])
    axes.set(xlim=(-0.04, 1.04))


def _spans(scale: Scale, box: Any) -> list[tuple[float, float]]:
    """Return where a box lies on a scale."""
    if isinstance(box, Choice):
        middles = [scale.position(option) for option in box.options]
        return [(middle - 0.03, middle + 0.03) for middle in middles]
    return [(scale.position(box.low), scale.position(box.high))]
