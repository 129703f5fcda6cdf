"""``fastbn replay FOLDER``."""

import argparse
from pathlib import Path

from fastbn.cli.results import tell
from fastbn.demo.watch import replay

DESCRIPTION = """
Train the run in a folder of `fastbn watch` again, nudges and all, from its log alone, and compare
every bit, to the last checkpoint. It needs the same versions and data.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = DESCRIPTION
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that of `fastbn watch`")


def run(*, folder: Path) -> int:
    """Replay a run."""
    tell(replay(folder))
    return 0
