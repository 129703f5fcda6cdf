"""Optuna's journal in a file; a record that was cut off is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from fastbn.demo import DemoError
from fastbn.files import check_writable
from fastbn.tune.storage import log, refused, told_if_slow

RECORD = b'{"op_code":'  # how Optuna begins one


class Journal(JournalFileBackend):  # type: ignore[misc]  # Optuna's types are not read
    """A journal whose errors are the storage's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
        super().__init__(str(path), _Lock(path))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from a number on."""
        try:
            yield from super().read_logs(log_number_from)
        except (OSError, ValueError) as error:
            raise refused(str(self.path), error) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records."""
        try:
            super().append_logs(logs)
        except OSError as error:
            raise refused(str(self.path), error) from error


# Symbolic links, Optuna's own choice, need a privilege on Windows.
class _Lock(JournalFileOpenLock):  # type: ignore[misc]
    """Held by the one that writes, who finds the journal mended."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def acquire(self) -> bool:
        why = "another process writes, or was killed while it wrote"
        until = f"if the file stays for {self.grace_period} s, it is taken away"
        with told_if_slow(f"{self.path}.lock: {why}; {until}"):
            super().acquire()
        try:
            _mend(self.path)
        except BaseException:
            self.release()
            raise
        return True


def _mend(path: Path) -> None:
    """Cut off what a full disk, a kill or a power failure has left behind the last whole record.

    Raises
    ------
    DemoError
        If what is to be cut off does not look like the beginning of a record.
    """
    with path.open("r+b") as file:
        if file.seek(0, 2) == 0 or (file.seek(-1, 2), file.read())[1] == b"\n":
            return
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        rest = content[whole:].rstrip(b"\0")
        if not rest.startswith(RECORD) and not RECORD.startswith(rest):
            raise DemoError(f"storage: {path}: cannot be used: its last line is not of a journal")
        file.truncate(whole)
    cut = len(content) - whole
    log.warning("storage: %s: its last record was cut; %d bytes are left out", path, cut)
