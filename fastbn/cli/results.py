"""What comes out of a training: the options that name files, and the last lines printed."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastbn.demo import DemoError, require
from fastbn.demo.config import Config
from fastbn.demo.curves import check_drawing, draw
from fastbn.demo.files import absolute, check_writable, refusals
from fastbn.demo.train import Trainer


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


def check_files(
    config: Config,
    plot: Path | None,
    save: Path | None,
    export: Path | None,
    inputs: Mapping[str, Path | None],
) -> None:
    """Find out before a training what would be lost after it; no output may be an input."""
    data = Path(config.data) if config.data.endswith(".npz") else None
    named = {name: path for name, path in {**inputs, "--data": data}.items() if path}
    outputs = (("--plot", plot, ".png"), ("--save", save, ""), ("--export", export, ".safetensors"))
    for name, path, suffix in outputs:
        if not path:
            continue
        if suffix not in ("", path.suffix.lower()):
            raise DemoError(f"{name}: expected the name of a {suffix} file, got {path}")
        for other, file in named.items():
            if same(path, file):
                raise DemoError(f"{name}: expected another file than that of {other}, got {path}")
        named[name] = path
        if path == plot:
            check_drawing()
        else:
            require("safetensors", "io")
        check_writable(path, option=name)
    if export and config.norm == "instance":
        raise DemoError(
            "--export: expected --norm batch or none, as instance norm cannot be folded, got"
            " --norm instance"
        )


def same(path: Path, other: Path) -> bool:
    """Return whether two paths are of one file, which may not be there yet."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # one is not there, for instance
        return absolute(str(path)) == absolute(str(other))


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

    With others, each one's accuracies are told before. What cannot be written is told in the end.
    """
    trainers, failed = [trainer, *others], list[DemoError]()
    lines, exported = list[str](), list[str]()
    # The files come before the lines: what is printed may have no reader any more.
    if plot:
        try:
            with refusals(f"--plot {plot}"):
                draw(plot, trainers)
            lines = [f"curves: {plot}"]
        except DemoError as error:
            failed.append(error)
    if export:
        try:
            exported = [trainer.export(export), f"weights: {export}"]
        except DemoError as error:
            failed.append(error)
    accuracies = [each.evaluate(each.data.test)[1] for each in trainers]
    for each, accuracy in zip(trainers, accuracies, strict=True):
        if others:
            epochs = each.epochs_to(0.95)
            when = f"reached in epoch {epochs}" if epochs else "not reached"
            lines.append(f"{each.name}: 95% validation accuracy {when}; on test {accuracy:.4f}")
    print(*lines, *exported, f"test accuracy: {accuracies[0]:.4f}", sep="\n")
    if failed:
        raise DemoError("; ".join(map(str, failed)))
