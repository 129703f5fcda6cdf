"""Show how fast fastbn is on this machine, beside the libraries that are installed.

`bench/` of the repository measures more cases in the same way: `pytest bench`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import geometric_mean, median
from timeit import Timer
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn.cli.cases import AXIS, BATCH, CORES, MOVED, Case, short_cases
from fastbn.cli.peers import OURS, PEERS, Contender

ROUNDS = 5
FEWER = 3  # of the command, which promises to end within a minute
BLOCK = 0.005  # seconds; a round of a contender is as many calls as fill it
REST = 0.015  # seconds before a round, for the last one's threads to fall asleep
# Seconds. A call longer than this is measured in two rounds only, to save time.
LONG = 0.03
TRIES = 3
# After this many seconds the command measures two rounds and repeats none.
ENOUGH = 12
# A contender's slowest round divided by its fastest. A larger ratio means that something
# interfered.
SPREAD = 3.0
# The load before the run, as a part of the CPUs. A higher load makes the numbers unreliable.
BUSY = 0.25

NAMES = {
    "forward_relu": "forward, ReLU",
    "backward_relu": "backward, ReLU",
    "forward_add_relu": "forward, add, ReLU",
    "backward_add_relu": "backward, add, ReLU",
}
FAMILIES = ["ResNet-50", "MLP", "course", "few channels", "tiny", "other dtypes", "one call"]
LEGEND = f"""\
median: how long fastbn takes for the batch norms of ResNet-50 at batch {BATCH} together (sum), or
for one shape among several (geometric mean). of ceiling: 100 % is the speed at which NumPy copies
x (backward: adds two arrays, as does forward with a residual), the same bytes on as many threads.
It can be more, for fastbn writes large results past the cache and NumPy does not.
Others: how many times as long as fastbn they take. Below 1 they are faster."""


class Timing(NamedTuple):
    """Seconds per call in the rounds of a contender."""

    median: float
    fastest: float
    slowest: float

    @property
    def spread(self) -> float:
        """How many times as long as the fastest round the slowest took."""
        return self.slowest / self.fastest

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Sum up some rounds."""
        return cls(median(seconds), min(seconds), max(seconds))


@dataclass
class Row:
    """A case, and the times of all who took part."""

    case: Case
    times: dict[str, Timing]

    @property
    def spread(self) -> float:
        """How uneven the rounds of the most uneven contender are."""
        return max(timing.spread for timing in self.times.values())


# Measuring.


def found(
    peers: Mapping[str, type[Contender]] = PEERS,
) -> tuple[dict[str, str], list[str]]:
    """Return the versions of the peers that are installed, and the names of the others."""
    versions = {name: peer.version() for name, peer in peers.items()}
    return {n: v for n, v in versions.items() if v}, [n for n, v in versions.items() if not v]


def load_before() -> float:
    """Return how many CPUs others have kept busy in the last minute, or NaN."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def prepare(case: Case, contender: type[Contender]) -> Callable[[], Any]:
    """Return the contender's fastest way of doing the case's operation, after a look at results."""
    instance = contender(case, case.arrays)
    ways = instance.ways()
    for name, call in ways.items():
        y = instance.array(call())
        if y is not None and contender is not OURS["fastbn"]:
            y = np.array(y.reshape(-1)[::61], np.float64)  # before fastbn writes to the same array
            ours = OURS["fastbn"](case, case.arrays)
            wanted = ours.array(ours.ways()[""]())
            assert wanted is not None
            wanted = wanted.reshape(-1)[::61].astype(np.float64)
            if not abs(y - wanted).mean() <= 1e-2 * abs(wanted).mean():
                raise AssertionError(f"{case}: {contender.__name__} {name} has another result")
    if len(ways) == 1:
        return next(iter(ways.values()))
    best = {way: min(_block(way, _size(way)) for _ in range(2)) for way in ways.values()}
    return min(best, key=lambda way: best[way])


def race(
    calls: Mapping[str, Callable[[], Any]], tries: int = TRIES, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return the seconds per call of each contender, round by round.

    They take turns, so that noise falls on all of them. Where rounds of one differ too much, all
    is measured again, and the most even try counts.
    """
    sizes = {name: _size(call) for name, call in calls.items()}
    results = []
    for _ in range(tries):
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for turn in range(rounds):
            for name in order:
                if sizes[name] > BLOCK / LONG or turn in (0, rounds - 1):
                    seconds[name].append(_block(calls[name], sizes[name]))
            order.append(order.pop(0))
        results.append((max(Timing.of(each).spread for each in seconds.values()), seconds))
        if results[-1][0] <= SPREAD:
            break
    return min(results, key=lambda each: each[0])[1]


def _size(call: Callable[[], Any]) -> float:
    """Return how many calls fill a block, or a part of one call."""
    time.sleep(REST)
    seconds = Timer(call).timeit(1)  # the first one may be slower than the others
    return BLOCK / (seconds if seconds > LONG else _block(call, 1))


def _block(call: Callable[[], Any], size: float) -> float:
    time.sleep(REST)
    number = math.ceil(size)
    if size > BLOCK / LONG:
        call()  # wakes the threads, and brings the arrays back into the cache
    return Timer(call).timeit(number) / number


# Telling.


class Line(NamedTuple):
    """The rows of an operation and a layout, as the table has them."""

    case: Case  # the first of them
    over: str
    seconds: dict[str, float]  # of those who took part in all
    speed: float  # GB/s of fastbn

    def ratio(self, contender: str) -> float:
        """Return how many times as long as fastbn a contender takes."""
        return self.seconds[contender] / self.seconds["fastbn"]


def lines(rows: Iterable[Row]) -> list[Line]:
    """Put the rows of an operation, layout, number of threads, dtype and family into a line."""

    def key(row: Row) -> tuple[Any, ...]:
        c = row.case
        return (
            FAMILIES.index(c.family), c.dtype, list(MOVED).index(c.operation),
            list(AXIS).index(c.layout), c.threads,
        )  # fmt: skip

    groups = groupby(sorted((row for row in rows if "fastbn" in row.times), key=key), key)
    return [_line(list(members)) for _, members in groups]


def _line(rows: list[Row]) -> Line:
    cases = [row.case for row in rows]
    if cases[0].family == "ResNet-50":
        over = f"sum of {sum(case.count for case in cases)} norms"
    elif len(cases) > 1:
        over = f"{cases[0].family}, geo. mean of {len(cases)}"
    else:
        over = f"one {cases[0].shape}"

    def mean(values: list[float]) -> float:
        if cases[0].family == "ResNet-50":
            return sum(case.count * value for case, value in zip(cases, values, strict=True))
        return geometric_mean(values)

    everywhere = [name for name in rows[0].times if all(name in row.times for row in rows)]
    seconds = {name: mean([row.times[name].median for row in rows]) for name in everywhere}
    speed = mean([float(case.bytes) for case in cases]) / seconds["fastbn"] / 1e9
    return Line(cases[0], over, seconds, speed)


def header(peers: Iterable[str]) -> list[str]:
    """Return the titles of the table's columns."""
    return ["operation", "layout", "of what", "threads", "median", "GB/s", "of ceiling", *peers]


def cells(line: Line, peers: Iterable[str]) -> list[str]:
    """Return what stands in a line of the table."""
    case, seconds = line.case, line.seconds
    return [
        NAMES.get(case.operation, case.operation),
        case.layout if case.dtype == "float32" else f"{case.layout} {case.dtype}",
        line.over,
        str(case.threads),
        duration(seconds["fastbn"]),
        f"{line.speed:.3g}",
        f"{100 * line.ratio('ceiling'):.0f} %" if "ceiling" in seconds else "",
        *(f"{line.ratio(peer):.3g}x" if peer in seconds else "" for peer in peers),
    ]


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in [("s", 1), ("ms", 1e-3), ("us", 1e-6)]:
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def widths(table: Iterable[Sequence[str]]) -> list[int]:
    """Return how wide each column of a table is."""
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def aligned(row: Sequence[str], columns: Sequence[int]) -> str:
    """Return a line of the table for a terminal, with columns of these widths."""
    left, right = row[:3], row[3:]
    texts = [f"{text:<{width}}" for text, width in zip(left, columns[:3], strict=True)]
    texts += [f"{text:>{width}}" for text, width in zip(right, columns[3:], strict=True)]
    return "  ".join(texts).rstrip()


def doubts(load: float, rows: Iterable[Row], cores: int = CORES) -> list[str]:
    """Return why these times are not to be believed."""
    reasons = []
    if load > BUSY * cores:
        reasons.append(f"the machine was busy before: load {load:.1f} on {cores} CPUs")
    for row in rows:
        reasons += [
            f"rounds of {name} in {row.case} differ by {timing.spread:.1f} times"
            for name, timing in row.times.items()
            if timing.spread > SPREAD
        ]
    return reasons


def verdict(load: float, rows: Sequence[Row], cores: int = CORES) -> str:
    """Say in one line whether the machine was quiet enough."""
    reasons = doubts(load, rows, cores)
    if reasons:
        more = f" (and {len(reasons) - 1} more such)" if len(reasons) > 1 else ""
        return f"Do not believe this table: {reasons[0]}{more}."
    most = max((row.spread for row in rows), default=1.0)
    before = "load not known" if math.isnan(load) else f"load {load:.1f} before"
    return f"The machine was quiet: {before}, rounds of a case differ by {most:.1f} times at most."


def about(versions: Mapping[str, str], absent: Iterable[str]) -> str:
    """Say what takes part, before anything is measured."""
    there = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"peers found: {there}; not installed: {', '.join(absent) or 'none'}"


def run() -> int:
    """Measure the short table and print it; return the exit status."""
    load, start = load_before(), time.monotonic()
    versions, absent = found()
    threads = fastbn.get_num_threads()
    isa = fastbn.runtime_info()["isa"]
    print(f"fastbn {fastbn.__version__} ({isa}), {threads} threads on {CORES} CPUs")
    print(about(versions, absent))
    print("It takes less than a minute.\n", flush=True)
    titles, rows, failed = header(versions), list[Row](), dict[str, Exception]()
    typical = ["forward, add, ReLU", "", "sum of 32 norms", "", "99.9 ms", "", "", *versions]
    columns = widths([titles, typical])
    print(aligned(titles, columns), flush=True)
    try:
        for cases in short_cases(threads):
            for case in cases:
                rows.append(_measure(case, versions, failed, time.monotonic() - start))
            print(aligned(cells(_line(rows[-len(cases) :]), versions), columns), flush=True)
    finally:
        fastbn.set_num_threads(threads)
    for name, problem in failed.items():
        print(f"{name} did not take part: {problem}")
    print(f"\n{LEGEND}\n\n{verdict(load, rows)}")
    return 0


def _measure(case: Case, peers: Iterable[str], failed: dict[str, Exception], elapsed: float) -> Row:
    calls = {name: prepare(case, contender) for name, contender in OURS.items()}
    for name in peers:
        if name not in failed and PEERS[name].enters(case):
            try:
                calls[name] = prepare(case, PEERS[name])
            except Exception as problem:  # of one library, not of the others
                failed[name] = problem
    hurry = elapsed > ENOUGH
    seconds = race(calls, tries=1 if hurry else TRIES, rounds=2 if hurry else FEWER)
    return Row(case, {name: Timing.of(each) for name, each in seconds.items()})
