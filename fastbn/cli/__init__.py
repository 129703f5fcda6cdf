"""The command line: ``python -m fastbn`` or ``fastbn``.

A command is a module of this package. Its docstring is the text of --help. It has ``run``, which
takes the options given and returns the exit status, and ``add_options`` if it has any. Only the
module of the command that was typed is imported, so that each needs only its own extras.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

import fastbn

COMMANDS = {
    "train": "train a small NumPy network with batch norm",
    "watch": "train it in a folder, with curves, checkpoints and nudges while it goes on",
    "resume": "go on with a training that was saved, stopped or interrupted",
    "replay": "train the run in a folder again and compare every bit",
    "nudge": "change something in a run that `fastbn watch` has under way",
    "tune": "look for good hyper-parameters, by workers in parallel",
    "bench": "measure the speed on this machine",
    "info": "show versions, CPU features, kernel variant, threads",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves the usage to --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        0, or 2 after an error of the user's, or 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        If the arguments cannot be parsed, or ask for help or the version.
    """
    words = _as_command(list(sys.argv[1:] if argv is None else argv))
    parser = _Parser(prog="fastbn", description=fastbn.__doc__)
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        # An option that was not given does not appear in the result.
        commands.add_parser(name, help=summary, argument_default=argparse.SUPPRESS)
    command = commands.choices.get(words[0]) if words else None
    if command is None:
        parser.parse_args(words)  # tells the version, gives help, or tells what is wrong
        return 0
    module = import_module(f"fastbn.cli.{words[0]}")
    command.description = module.__doc__
    if hasattr(module, "add_options"):
        module.add_options(command)
    run = partial(module.run, words) if words[0] == "tune" else module.run
    given = vars(command.parse_args(words[1:]))
    try:
        return int(run(**given))
    except ValueError as error:
        # Imported here, because `info` and `bench` work without the demo.
        from fastbn.demo import DemoError

        if not isinstance(error, DemoError):
            raise
        print(f"{command.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("\n" + ": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


def _as_command(words: list[str]) -> list[str]:
    """Return ``watch FOLDER ...`` for ``train --watch FOLDER ...``, as it was spelt before."""
    if words[:1] != ["train"]:
        return words
    parser = _Parser(prog="fastbn train", add_help=False, allow_abbrev=False)
    group = parser.add_mutually_exclusive_group()
    for name in ("watch", "resume", "replay"):
        group.add_argument(f"--{name}")
    given, rest = parser.parse_known_args(words[1:])
    named = [[name, value] for name, value in vars(given).items() if value is not None]
    return [*named[0], *rest] if named else words
