"""The command line: ``python -m fastbn`` or ``fastbn``.

A command is a module of this package. Its docstring is the text of --help. It has ``run``, which
takes the options given and returns the exit status, and ``add_options`` if it has any. Only the
module of the command that was typed is imported, so that each needs only its own extras.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn, TextIO

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
        _tell(self.prog, message)
        self.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments. By default they are those of the process, and its standard streams are made
        fit for any text first.

    Returns
    -------
    int
        0, or 2 after an error that the user can mend, or 130 after Ctrl-C, or 141 where nobody
        reads the output any more.

    Raises
    ------
    SystemExit
        If the arguments cannot be parsed, or ask for help or the version.
    """
    if argv is None:
        _prepare_streams()
    program = "fastbn"
    try:
        try:
            words = _as_command(list(sys.argv[1:] if argv is None else argv))
            program += "".join(f" {word}" for word in words[:1] if word in COMMANDS)
            return _run(words)
        finally:
            if sys.stdout:
                sys.stdout.flush()  # an error of this can still be told, other than at the exit
    except ValueError as error:
        # Imported here, because `info` and `bench` work without the demo.
        from fastbn.demo import DemoError

        if not isinstance(error, DemoError):
            raise
        _tell(program, error)
    except MemoryError as error:
        _tell(program, f"the memory does not suffice: {error}".removesuffix(": "))
    except OSError as error:
        lost = error.filename == _Output.NAME
        if lost:
            _silence(sys.stdout)
        if lost and isinstance(error, BrokenPipeError):
            return 141  # what a shell tells of a program that SIGPIPE has ended
        _tell(program, error)
    except KeyboardInterrupt as interrupt:
        _print_error("\n" + ": ".join(["interrupted", *map(str, interrupt.args)]))
        return 130
    return 2


def _run(words: list[str]) -> int:
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
    return int(run(**vars(command.parse_args(words[1:]))))


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


def _prepare_streams() -> None:
    """Replace closed standard streams, and have the output say what its encoding cannot."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It takes the stream's number, which else a file of ours could get.
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(stream := sys.stdout, TextIOWrapper):
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        look = stream.encoding, errors, None, stream.line_buffering, stream.write_through
        sys.stdout = _Output(stream.detach(), *look)


class _Output(TextIOWrapper):
    """The standard output, where an error has its name."""

    NAME = "standard output"

    def write(self, text: str, /) -> int:
        with self._named_errors():
            return super().write(text)

    def flush(self) -> None:
        with self._named_errors():
            super().flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.NAME) from error


def _tell(program: str, error: object) -> None:
    """Tell an error in one line, whatever is in the names that the user gave."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    _print_error(f"{program}: error: {text}")


def _print_error(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody can be told
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Have a stream that takes nothing any more lead nowhere: Python tries again at the exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
