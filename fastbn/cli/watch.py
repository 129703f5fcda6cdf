"""Train a network as `fastbn train` does, in a folder, and change it on the way.

The folder has curves.png and curves.csv, which are renewed each epoch, log.jsonl and checkpoints:
those of the last ten epochs, of the epoch with the best validation accuracy, and of the epochs
right before and right after a nudge. `fastbn nudge FOLDER` changes the training, `fastbn resume
FOLDER` goes on after a stop or a kill, and `fastbn replay FOLDER` trains it again.
"""

import argparse
from pathlib import Path
from typing import Any

from fastbn.cli.network import add_config_option, add_network_options, read_network_options
from fastbn.cli.results import resumable, tell
from fastbn.demo.config import configure
from fastbn.demo.log import NAME
from fastbn.demo.watch import start


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or an empty one")
    add_config_option(parser)
    add_network_options(parser)


def run(*, folder: Path, **given: Any) -> int:
    """Start a run."""
    config = configure(read_network_options(given))
    with resumable(lambda: folder if (folder / NAME).exists() else None):
        trainer = start(folder, config)
        print(f"curves: {folder / 'curves.png'}")
        tell(trainer)
    return 0
