"""Where a study is kept: in memory, in a file, in a database, or behind a server."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastbn.demo import DemoError, require
from fastbn.files import check_writable

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

POLL = 0.3  # seconds between two looks at the storage
SLOW = 5.0  # seconds after which a wait is told
BLAME = "raised by the objective"
# The libraries whose errors are the storage's, unless the objective has raised them.
LIBRARIES = ("grpc", "optuna", "psycopg", "sqlalchemy", "sqlite3")

log = logging.getLogger("fastbn.tune")


@contextmanager
def opened(url: str | None) -> Iterator[BaseStorage]:
    """Open a storage, and close it in the end; its errors name it."""
    with ExitStack() as stack:
        try:
            storage = _open(url, stack)
        except DemoError:
            raise
        except Exception as error:  # each kind of storage has its own errors
            raise refused(url, error) from error
        try:
            yield storage
        except Exception as error:
            library = type(error).__module__.partition(".")[0]
            if library not in LIBRARIES or raised_by_objective(error):
                raise
            raise refused(url, error.__cause__ or error) from error


def refused(url: str | None, error: BaseException) -> DemoError:
    """Return an error of a storage, which names it."""
    why = (str(error).splitlines() or [type(error).__name__])[0]  # the SQL stands below
    return DemoError(f"storage: {url}: cannot be used: {why}")


def raised_by_objective(error: BaseException) -> bool:
    """Return whether an error was the objective's own."""
    return any(note.startswith(BLAME) for note in getattr(error, "__notes__", ()))


@contextmanager
def told_if_slow(waits_for: str) -> Iterator[None]:
    """Say what is waited for, if it takes long."""
    timer = threading.Timer(SLOW, log.warning, ["waiting for %s", waits_for])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def absolute(url: str) -> str:
    """Return the URL of a storage, right in any folder: the objective may go to another.

    Raises
    ------
    DemoError
        If it is a database in memory.
    """
    scheme, separator, rest = url.partition("://")
    if not separator and url != ":memory:":
        return str(Path(url).absolute())
    if separator and scheme.partition("+")[0] != "sqlite":
        return url
    file = rest.removeprefix("/")
    if file.partition("?")[0] in ("", ":memory:") or file == rest or "mode=memory" in file:
        expected = f"storage: expected a file or sqlite:///FILE, got {url}"
        raise DemoError(f"{expected}: workers cannot share a database in memory")
    return url if file.startswith("file:") else f"{scheme}:///{Path(file).absolute()}"


def _open(url: str | None, stack: ExitStack) -> BaseStorage:
    storages = require("optuna", "tune").storages
    if url is None:
        return storages.InMemoryStorage()
    scheme, separator, rest = url.partition("://")
    if not separator:
        from fastbn.tune.journal import Journal

        return storages.JournalStorage(Journal(Path(url)))
    if scheme == "grpc":
        require("grpc", "servers")
        host, _, port = rest.rpartition(":")
        if not host or not port.isdecimal():
            raise DemoError(f"storage: expected grpc://HOST:PORT, got {url}")
        proxy = storages.GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=10)
        stack.callback(proxy.close)
        return proxy
    if scheme == "postgresql":
        require("psycopg", "servers")
        url = f"postgresql+psycopg://{rest}"  # SQLAlchemy's default driver has changed once
    options = {}
    if scheme.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
        file = Path(rest.removeprefix("/").partition("?")[0])
        if file.exists():
            check_writable(file)
    for attempt in itertools.count(1):
        try:
            database = storages.RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            # Two that open a new database at once disagree on who creates the tables.
            if attempt == 5 or isinstance(error, ImportError):
                raise
            time.sleep(POLL)
    stack.callback(database.engine.dispose)
    return storages.get_storage(database)
