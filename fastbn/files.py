"""Writing files whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import IO


def check_writable(path: Path) -> None:
    """Raise OSError where `write_atomically` would, as far as that can be known before."""
    tempfile.TemporaryFile(dir=_target(path).parent).close()


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that then replaces ``path``: at any time the old one or the new.

    Raises
    ------
    OSError
        If the operating system refuses; the old file is untouched then.
    """
    target = _target(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power failure could leave the new name empty
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _target(path: Path) -> Path:
    """Return the file to replace: through a symbolic link, which stays one."""
    target = path.resolve()
    # Only a regular file may be replaced: /dev/null must stay what it is.
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "expected a file, got a folder or a device", str(path))
    return target
