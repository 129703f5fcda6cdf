"""Errors of the operating system, told in one line that names the option or the file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastbn import files
from fastbn.demo import DemoError


def one_line(error: BaseException) -> str:
    """Return what an exception says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def absolute(path: str) -> str:
    """Return a path that is right in any folder, or as it is where the system cannot tell it."""
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError, ValueError):  # no working directory; links in a circle; a NUL
        return path


@contextmanager
def refusals(name: object) -> Iterator[None]:
    """Raise an OSError from within as a `DemoError` that begins with a name."""
    try:
        yield
    except OSError as error:
        why = one_line(error)
        if error.filename and str(name).endswith(str(error.filename)):  # it is not named twice
            why = f"[Errno {error.errno}] {error.strerror}"
        raise DemoError(f"{name}: cannot be written: {why}") from error


def check_writable(path: Path, *, option: str) -> None:
    """Find out before the work starts whether `write_atomically` will be able to write there.

    Raises
    ------
    DemoError
        If it will not.
    """
    with refusals(f"{option} {path}"):
        files.check_writable(path)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, option: str) -> None:
    """Let ``write`` fill a file that then replaces ``path``: at any time the old one or the new.

    Raises
    ------
    DemoError
        If the operating system refuses; the old file is untouched then.
    """
    with refusals(f"{option} {path}"):
        files.write_atomically(path, write)
