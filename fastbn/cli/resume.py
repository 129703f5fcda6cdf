"""Go on with a training, with all options as they were; only --epochs may be raised.

A FILE is one of `fastbn train --save`. It goes on being saved to, unless --save names another. A
FOLDER is one of `fastbn watch` whose run was killed or stopped, or is to have more epochs.
"""

import argparse
from pathlib import Path
from typing import Any

from fastbn.cli.network import add_config_option, add_network_options, read_network_options
from fastbn.cli.ranks import add_mpi_options, ranks
from fastbn.cli.results import add_file_options, check_files, resumable, same, tell
from fastbn.demo import DemoError, watch
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.log import NAME
from fastbn.demo.train import Trainer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("saved", type=Path, metavar="FILE|FOLDER", help="what to go on with")
    add_file_options(parser)
    # The other options may be given where they say what the file says: the command that began a
    # training can be typed again.
    add_config_option(parser)
    add_network_options(parser, {"epochs": "train up to this epoch"})
    add_mpi_options(parser)


def run(
    *,
    saved: Path,
    plot: Path | None = None,
    save: Path | None = None,
    export: Path | None = None,
    mpi: bool = False,
    **given: Any,
) -> int:
    """Go on with a training; with `mpi` together with the other ranks, however many there are."""
    if mpi and saved.is_dir():
        raise DemoError("--mpi: cannot be used with a folder")
    with ranks(mpi) as comm:
        return _resume(comm, saved, plot, save, export, given)


def _resume(
    comm: Any,
    saved: Path,
    plot: Path | None,
    save: Path | None,
    export: Path | None,
    given: dict[str, Any],
) -> int:
    fields = read_network_options(given)
    if saved.is_dir():
        if plot or save or export:
            raise DemoError("--plot, --save, --export: cannot be used with a folder")
        with resumable(lambda: saved):
            trainer = watch.resume(saved, fields)
            print(f"curves: {saved / 'curves.png'}")
            tell(trainer)
        return 0
    if not save and (saved.parent / NAME).exists():
        raise DemoError(
            f"{saved}: expected --save with another file, or the folder alone:"
            " this one belongs to a run of `fastbn watch`"
        )
    save = save or saved
    begun: list[Trainer] = []
    if comm and comm.rank:
        plot = save = export = None
    with resumable(lambda: begun[0].saved if begun else saved, plot, export, comm):
        trainer = load_checkpoint(saved, fields)
        begun.append(trainer)
        read = None if not save or same(save, saved) else saved
        inputs = {"FILE": read, "--config": given.get("config")}
        check_files(trainer.config, plot, save, export, inputs)
        if comm:
            trainer.join(comm)
        trainer.run(save)
        tell(trainer, plot=plot, export=export)
    return 0
