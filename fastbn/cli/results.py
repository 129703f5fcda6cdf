"""What comes out of a training: the options that name files, and the last lines printed."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastbn.demo import DemoError, require
from fastbn.demo.curves import draw
from fastbn.demo.files import check_writable, refusals
from fastbn.demo.train import Config, Trainer


def add_file_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --plot, --save and --export, and return their group."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--plot", type=Path, metavar="FILE.png", help="draw the curves of loss and accuracy")
    add("--save", type=Path, metavar="FILE", help="keep each finished epoch, to be resumed")
    add(
        "--export",
        type=Path,
        metavar="FILE.safetensors",
        help="in the end, write weights and biases with each batch norm folded into them, and tell"
        " whether the predictions are the same",
    )
    return group


def check_files(config: Config, plot: Path | None, save: Path | None, export: Path | None) -> None:
    """Find out before a training what would be lost after it."""
    outputs = (
        ("--plot", plot, ".png", "matplotlib", "demo"),
        ("--save", save, "", "safetensors", "io"),
        ("--export", export, ".safetensors", "safetensors", "io"),
    )
    for option, path, suffix, module, extra in outputs:
        if path and suffix not in ("", path.suffix.lower()):
            raise DemoError(f"{option}: expected the name of a {suffix} file, got {path}")
        if path:
            require(module, extra)
            check_writable(path, option=option)
    if save and str(save.resolve()) == config.data:
        raise DemoError(f"--save: expected another file than that of --data, got {save}")
    if export and config.norm == "instance":
        raise DemoError(
            "--export: expected --norm batch or none, as instance norm cannot be folded, got"
            " --norm instance"
        )


@contextmanager
def resumable(
    saved: Callable[[], Path | None],
    plot: Path | None = None,
    export: Path | None = None,
    comm: Any = None,
) -> Iterator[None]:
    """Have Ctrl-C tell the command that goes on with what was saved."""
    try:
        yield
    except KeyboardInterrupt:
        path = saved()
        if path is None:
            text = "nothing was saved; --save FILE keeps each epoch that is finished"
        else:
            command = [sys.executable, "-m", "fastbn", "resume", str(path)]
            for option, file in {"--plot": plot, "--export": export}.items():
                command += [option, str(file)] if file else []
            if comm:
                command = ["mpiexec", "-n", str(comm.size), *command, "--mpi"]
            text = f"the finished epochs are saved; resume with\n{shlex.join(command)}"
        raise KeyboardInterrupt(text) from None


def tell(
    trainer: Trainer, *others: Trainer, plot: Path | None = None, export: Path | None = None
) -> None:
    """Draw and export what was asked for, and print the accuracy on the test examples.

    With others, each one's accuracies are told before.
    """
    trainers = [trainer, *others]
    if plot:
        with refusals(f"--plot {plot}"):
            draw(plot, trainers)
        print(f"curves: {plot}")
    accuracies = [each.evaluate(each.data.test)[1] for each in trainers]
    for each, accuracy in zip(trainers, accuracies, strict=True):
        if others:
            epochs = each.epochs_to(0.95)
            when = f"reached in epoch {epochs}" if epochs else "not reached"
            print(f"{each.name}: 95% validation accuracy {when}; on test {accuracy:.4f}")
    if export:
        print(trainer.export(export))
        print(f"weights: {export}")
    print(f"test accuracy: {accuracies[0]:.4f}")
