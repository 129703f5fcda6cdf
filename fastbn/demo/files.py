"""Files that options of the command line name: .npz files that may hold anything; results."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastbn import files
from fastbn.demo import DemoError


def read_npz(path: Path, *, option: str, compressed: bool = True) -> dict[str, NDArray[Any]]:
    """Read all arrays of an .npz file; pickled objects are refused.

    Parameters
    ----------
    path : Path
    option : str
        The option that named the file, for the error message.
    compressed : bool
        False refuses a file that unpacks to more bytes than it has.

    Raises
    ------
    DemoError
        If the file is missing, damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if not compressed and unpacked > path.stat().st_size:
            raise ValueError("its contents are compressed")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise DemoError(f"{option} {path}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DemoError(f"{option} {path}: not an .npz file, or damaged") from error
    except (OSError, ValueError, MemoryError, NotImplementedError, RuntimeError) as error:
        raise DemoError(f"{option} {path}: cannot be read: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return what an exception says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def check_writable(path: Path, *, option: str) -> None:
    """Find out before the work starts whether `write_atomically` will be able to write there.

    Raises
    ------
    DemoError
        If it will not.
    """
    with refusals(path, option):
        files.check_writable(path)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, option: str) -> None:
    """Let ``write`` fill a file that then replaces ``path``: at any time the old one or the new.

    Raises
    ------
    DemoError
        If the operating system refuses; the old file is untouched then.
    """
    with refusals(path, option):
        files.write_atomically(path, write)


@contextmanager
def refusals(path: Path, option: str) -> Iterator[None]:
    """Make what the operating system refuses, within, a `DemoError`."""
    try:
        yield
    except OSError as error:
        raise DemoError(f"{option} {path}: cannot be written: {one_line(error)}") from error
