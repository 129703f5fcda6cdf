"""What the tests of the search share: objectives that worker processes can import, helpers."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import fastbn
from fastbn.tune import choice, integer, log_uniform, one_minus_log_uniform, search

space = {
    "lr": log_uniform(1e-4, 1),
    "momentum": one_minus_log_uniform(0.9, 0.999),
    "units": integer(1, 9),
    "kind": choice("a", "b", 3),
}
start = {"lr": 0.1, "momentum": 0.9, "units": 5, "kind": "b"}


def bowl(params):
    """Return the distance from lr=0.01, momentum=0.99, units=7."""
    lr, momentum = (
        space["lr"].position(params["lr"]),
        space["momentum"].position(params["momentum"]),
    )
    return (lr - 0.5) ** 2 + (momentum - 0.5) ** 2 + abs(params["units"] - 7) / 100


def steps(params):
    """Yield values that sink to that of `bowl`."""
    for step in range(1, 9):
        yield bowl(params) + 1 / step


def wrong(params):
    raise ArithmeticError(f"no value for {params['units']}")


def wrong_at_length(params):
    """Raise an error that is longer than a pipe holds."""
    raise ArithmeticError("x" * 100_000)


def killed(params):
    """Kill the worker at one value, each time."""
    if params["units"] == 5:
        os.kill(os.getpid(), 9)
    return bowl(params)


class UnspeakableError(Exception):
    """Cannot say what is wrong."""

    def __str__(self):
        raise RuntimeError


def unspeakable(params):
    raise UnspeakableError


def _interrupt():
    raise KeyboardInterrupt


ENDS = {
    "exits": lambda: sys.exit("no GPU"),
    "exits well": lambda: sys.exit(0),
    "interrupts": _interrupt,
    "ends at once": lambda: os._exit(0),
    "is told to end": lambda: signal.raise_signal(signal.SIGTERM),
    "crashes": lambda: signal.raise_signal(signal.SIGSEGV),
}


@dataclass(frozen=True)
class Ending:
    """Ends its worker, each time in another way; a file tells how often it was called."""

    path: str
    ways: tuple[str, ...]

    def __call__(self, params):
        with open(self.path, "a") as file:  # noqa: PTH123
            file.write("call\n")
        calls = len(begun(Path(self.path)))
        ENDS[self.ways[(calls - 1) % len(self.ways)]]()


@dataclass(frozen=True)
class Logged:
    """The `bowl`; a line in a file tells of each call: pid, threads, threads of BLAS, lr.

    No call ends before so many processes have begun one.
    """

    path: str
    processes: int = 1

    def __repr__(self):
        return "Logged"

    def __call__(self, params):
        threads = fastbn.get_num_threads(), os.environ.get("OPENBLAS_NUM_THREADS")
        with open(self.path, "a") as file:  # noqa: PTH123
            file.write(f"{os.getpid()} {threads[0]} {threads[1]} {params['lr']!r}\n")
        wait_until(lambda: len({line[0] for line in begun(Path(self.path))}) >= self.processes)
        return bowl(params)


def begun(path):
    """Return the lines of the file of `Logged`, as lists of words."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(happened):
    """Return when something has happened; it may take a minute on a busy machine."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def quiet(objective=bowl, where=space, **options):
    """Search without showing it."""
    return search(objective, where, progress=False, **options)


def content(result):
    """Return what does not depend on who worked when."""
    return [(r.number, r.round, r.state, r.params, r.value) for r in result.trials]
