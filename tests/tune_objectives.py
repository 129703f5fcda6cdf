"""Objectives for the tests of the search, in a module that worker processes can import."""

import os
import time
from dataclasses import dataclass

import fastbn
from fastbn.tune import choice, integer, log_uniform, one_minus_log_uniform

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


def killed(params):
    """Kill the worker at one value, each time."""
    if params["units"] == 5:
        os.kill(os.getpid(), 9)
    return bowl(params)


@dataclass(frozen=True)
class Logged:
    """The `bowl`, slowly; a line in a file tells of each call: pid, threads, lr."""

    path: str
    seconds: float = 0.0

    def __repr__(self):
        return "Logged"

    def __call__(self, params):
        threads = fastbn.get_num_threads(), os.environ.get("OPENBLAS_NUM_THREADS")
        with open(self.path, "a") as file:  # noqa: PTH123
            file.write(f"{os.getpid()} {threads[0]} {threads[1]} {params['lr']!r}\n")
        time.sleep(self.seconds)
        return bowl(params)
