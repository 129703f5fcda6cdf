"""The picture of a training: loss and accuracy by epoch."""

from collections.abc import Sequence
from pathlib import Path

from fastbn.demo import require
from fastbn.demo.files import write_atomically
from fastbn.demo.train import Trainer


def draw(path: Path, trainers: Sequence[Trainer]) -> None:
    """Draw the curves of networks of the same kind, with different norms or none, as a PNG.

    Raises
    ------
    DemoError
        If matplotlib is missing or the file cannot be written.
    """
    config = trainers[0].config
    # Not by pyplot, which would look for a display.
    figure = require("matplotlib.figure").Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    figure.suptitle(
        f"{config.model} {'-'.join(map(str, config.hidden))} on {Path(config.data).name},"
        f" {config.optimizer}, learning rate {config.lr:g}"
    )
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for trainer, color in zip(trainers, ("C0", "C1", "C2"), strict=False):
            epochs = range(1, len(trainer.history) + 1)
            for part, style in (("training", "--"), ("validation", "-")):
                key = metric if part == "training" else f"validation_{metric}"
                values = [epoch[key] for epoch in trainer.history]
                label = f"{trainer.name}, {part}"
                axes.plot(epochs, values, style, color=color, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        if metric == "loss":
            axes.set_yscale("log")
    write_atomically(path, lambda file: figure.savefig(file, format="png"), option="--plot")
