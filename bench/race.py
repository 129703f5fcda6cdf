"""Time callables against each other, fairly, on a machine that is not quiet.

pytest-benchmark times one test after another, so a minute of noise falls on one contender alone,
and the idle workers of one library spin on the core that the next one needs. Here the contenders
take turns in short blocks with a rest before each; their tests hand the recorded durations to
pytest-benchmark later, through a clock that replays them.
"""

import gc
import time
from collections import deque
from itertools import repeat
from math import ceil

ROUNDS = 5
BLOCK = 0.005  # seconds; a block is as many calls as fill it
REST = 0.015  # for the last one's workers to fall asleep
LONG = 0.03  # a block so long takes part in every third round: it says enough, and time is short


def race(calls):
    """Return, for each name in `calls`, the seconds per call in each of its blocks."""
    alone = {name: _block(call, 1) for name, call in calls.items()}
    durations = {name: [] for name in calls}
    order = deque(calls)
    for turn in range(ROUNDS):
        for name in order:
            if alone[name] < LONG or turn % 3 == 0:
                durations[name].append(_block(calls[name], ceil(BLOCK / alone[name])))
        order.rotate(1)
    return durations


def fastest(calls):
    """Return the name of the fastest of several ways to do the same."""
    if len(calls) == 1:
        return next(iter(calls))
    sizes = {name: ceil(BLOCK / _block(call, 1)) for name, call in calls.items()}
    return min(calls, key=lambda name: min(_block(calls[name], sizes[name]) for _ in range(3)))


def _block(call, size):
    time.sleep(REST)
    collecting = gc.isenabled()
    gc.disable()
    try:
        call()  # wakes the workers, and brings the arrays back into the cache
        start = time.perf_counter()
        for _ in repeat(None, size):
            call()
        return (time.perf_counter() - start) / size
    finally:
        if collecting:
            gc.enable()


_ticks = deque()


def replay_clock():
    return _ticks.popleft()


def replay(benchmark, durations):
    """Give recorded durations to pytest-benchmark; the test must be timed by `replay_clock`."""
    _ticks.clear()
    _ticks.extend(tick for duration in durations for tick in (0.0, duration))
    benchmark.pedantic(lambda: None, rounds=max(1, len(durations)))
