"""Train the run in a folder of `fastbn watch` again, from its log alone, nudges and all.

Every bit is compared, to the last checkpoint. This needs the same versions and the same data.
"""

import argparse
from pathlib import Path

from fastbn.cli.results import tell
from fastbn.demo.watch import replay


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that of `fastbn watch`")


def run(*, folder: Path) -> int:
    """Replay a run."""
    tell(replay(folder))
    return 0
