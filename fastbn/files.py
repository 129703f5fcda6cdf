"""Writing files whole or not at all."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def check_writable(path: Path) -> None:
    """Raise OSError where `write_atomically` would, as far as that can be known before."""
    with _new_file_beside(path):
        pass


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that then replaces ``path``: at any time the old one or the new.

    The new file has the permissions of the old one, and a symbolic link stays one.

    Raises
    ------
    OSError
        If the operating system refuses; the old file is untouched then.
    """
    with _new_file_beside(path) as (file, target):
        write(file)
        file.flush()
        os.fsync(file.fileno())  # else a power failure could leave the new name empty
        file.close()
        Path(file.name).replace(target)
    with suppress(OSError):  # the new file is there, and not every system can do this
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _new_file_beside(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a temporary file in the folder of the file to replace; yield both.

    What the operating system refuses names ``path``.
    """
    old = None
    with suppress(FileNotFoundError):
        old = path.stat()  # links in a circle: an OSError, where `resolve` raises something else
    # Only a regular file may be replaced: /dev/null must stay what it is.
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise FileExistsError(errno.EEXIST, "expected a file, got a folder or a device", str(path))
    target = path.resolve()
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    # Nobody can guess the name, and mode "x" follows no link. `tempfile.mkstemp` does that too, but
    # its 0600 would have to become what the umask grants, and asking for the umask changes it.
    temporary = target.with_name(f".{target.name[:50]}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if old is not None and hasattr(os, "fchown"):
                _take_permissions(file.fileno(), old)
            yield file, target
    except OSError as error:
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # it was moved, or never there
            temporary.unlink()


def _take_permissions(file: int, old: os.stat_result) -> None:
    """Give a file the owner, the group and the mode of another, as far as this user may."""
    mode = stat.S_IMODE(old.st_mode)
    for owner in (old.st_uid, -1):
        with suppress(PermissionError):
            os.fchown(file, owner, old.st_gid)
            break
    else:
        mode &= ~stat.S_IRWXG  # they were another group's
    os.fchmod(file, mode)
