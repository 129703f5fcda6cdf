"""The picture of a training: loss and accuracy by epoch."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastbn.demo import DemoError, require
from fastbn.demo.files import one_line
from fastbn.demo.train import Epoch, Trainer
from fastbn.files import write_atomically


def draw(
    path: Path,
    trainers: Sequence[Trainer],
    *,
    lr: float | None = None,
    marks: Sequence[tuple[int, str, bool]] = (),
    undone: Sequence[tuple[int, Sequence[Epoch]]] = (),
) -> None:
    """Draw the curves of networks of the same kind, with different norms or none, as a PNG.

    Parameters
    ----------
    path : Path
    trainers : sequence of Trainer
    lr : float, optional
        The learning rate for the title, where it is not that of the first configuration.
    marks : sequence of (int, str, bool)
        Texts, before which epoch each stands, and whether it was undone, and is pale.
    undone : sequence of (int, sequence of Epoch)
        Epochs of the first network that were rolled back, drawn pale, and the number of the first.

    Raises
    ------
    DemoError
        If matplotlib is missing or cannot draw.
    OSError
        If the file cannot be written.
    """
    config = trainers[0].config
    name = Path(config.data).name.encode(errors="backslashreplace").decode()
    title = f"{config.model} {'-'.join(map(str, config.hidden))} on {name}, {config.optimizer},"
    picture = io.BytesIO()
    with _figure(f"{title} learning rate {lr or config.lr:g}", picture) as figure:
        for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for first, branch in undone:
                _plot(axes, metric, branch, first, "C0")
            for index, trainer in enumerate(trainers):
                _plot(axes, metric, trainer.history, 1, f"C{index}", trainer.name)
            for before, text, pale in marks:
                alpha, side = (0.4, "right") if pale else (1, "left")
                axes.axvline(before - 0.5, color="0.5", linestyle=":", alpha=alpha)
                # Above the axes it hides no curve, and the layout makes room for it.
                place = {"xy": (before - 0.5, 1.02), "xycoords": axes.get_xaxis_transform()}
                look = {"rotation": 90, "ha": side, "va": "bottom", "fontsize": "small"}
                axes.annotate(text, **place, **look, alpha=alpha)
            axes.set(xlabel="epoch", ylabel=metric)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
            if metric == "loss":
                axes.set_yscale("log")
    write_atomically(path, lambda file: file.write(picture.getbuffer()))


def check_drawing() -> None:
    """Find out before the work starts whether `draw` will be able to.

    Raises
    ------
    DemoError
        If it will not.
    """
    with _figure("title", io.BytesIO()) as figure:
        figure.subplots().set(yscale="log")


@contextmanager
def _figure(title: str, png: io.BytesIO) -> Iterator[Any]:
    """Let a figure be filled, and draw it; tell what matplotlib's configuration forbids."""
    require("matplotlib")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a name in the title
            # Not by pyplot, which would look for a display.
            kind = require("matplotlib.figure").Figure
            figure = kind(figsize=(11, 4.8), dpi=120, layout="constrained")
            figure.suptitle(title, parse_math=False)
            yield figure
            figure.savefig(png, format="png")
    except Exception as error:  # a style, a font, a missing LaTeX
        raise DemoError(f"matplotlib cannot draw: {one_line(error)}") from error


def _plot(
    axes: Any, metric: str, epochs: Sequence[Epoch], first: int, color: str, name: str = ""
) -> None:
    """Draw the curves of training and validation; pale ones where there is no name."""
    numbers = range(first, first + len(epochs))
    for part, key, dash in (("training", "", "--"), ("validation", "validation_", "-")):
        look = {"label": f"{name}, {part}", "marker": "."} if name else {"alpha": 0.3}
        axes.plot(numbers, [epoch[key + metric] for epoch in epochs], dash, color=color, **look)
