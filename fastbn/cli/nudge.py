"""Change something in a training that `fastbn watch FOLDER` has under way.

The change is made at the start of the next epoch. Nudges are taken one after the other, in the
order in which they were given. What cannot be done is refused: at once, or where only the training
can tell, by a line that it prints and logs. Where no training is under way, a nudge waits for
`fastbn resume FOLDER`.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from fastbn.demo.log import Nudge
from fastbn.demo.watch import send


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="that of `fastbn watch`")
    add(
        "--rollback",
        type=int,
        metavar="EPOCH",
        help="go back to the end of an epoch whose checkpoint is kept, or with 0 to the start:"
        " parameters, learning rate, momentum and random numbers are as they were. Later epochs"
        " are left in the curves, pale; other options given with it are done after it",
    )
    add(
        "--lr",
        type=float,
        help="learning rate, as in `train --lr`: that of epoch 0, which --lr-decay goes on making"
        " smaller as if it had been so from the start",
    )
    add("--momentum", type=float, help="of --optimizer momentum, or beta1 of adam")
    add("--stop", action="store_true", help="end the run; `fastbn resume FOLDER` goes on with it")


def run(*, folder: Path, **given: Any) -> int:
    """Send a nudge and tell when it will be taken."""
    nudge = Nudge(**given)
    when = "the next epoch begins"
    if not send(folder, nudge):
        when = f"{shlex.join(['fastbn', 'resume', str(folder)])} goes on"
    print(f"sent, for when {when}: {nudge}")
    return 0
