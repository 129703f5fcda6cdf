"""Let the contenders of a case race when its first test asks; tell before, meanwhile and after."""

import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from math import prod
from shutil import get_terminal_size

import pytest
from contenders import PEERS
from replay import replay

import fastbn
from fastbn.cli import bench
from fastbn.cli.cases import CORES, MOVED

LOAD = bench.load_before()  # before this run adds its own
STATE = pytest.StashKey()
ENOUGH = 80  # seconds, after which a run without --full measures nothing again
EVERY = 30  # seconds between two lines of progress, where a line cannot be written over


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="bench: all cases, some twenty minutes")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('bench/ needs pytest-benchmark: pip install ".[bench]"')
    config.option.benchmark_quiet = config.option.verbose < 1  # -v shows its table of each case
    config.stash[STATE] = State(config)


class State:
    """What a run knows: who is there, what has been measured, how much is left."""

    def __init__(self, config):
        self.versions, self.absent = bench.found(PEERS)
        self.rows, self.measured = [], {}
        self.full = config.getoption("full")
        self.timed = not config.getoption("benchmark_disable")
        self.entries = defaultdict(list)  # of each case
        self.deselected = Counter()
        self.work = self.done = 0.0
        self.start = self.told = time.monotonic()


def pytest_report_header(config):
    state = config.stash[STATE]
    kind = "all cases (--full)" if config.getoption("full") else "a selection (--full takes all)"
    return [
        f"fastbn {fastbn.__version__} on {CORES} CPUs, load {LOAD:.1f} before; {kind}",
        bench.about(state.versions, state.absent),
    ]


def pytest_collection_modifyitems(config, items):
    """Leave out the cases of absent peers; know who races in which case."""
    state = config.stash[STATE]
    absent = [item for item in items if _contender(item) in state.absent]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]
    state.deselected.update(map(_contender, absent))


def pytest_collection_finish(session):
    state = session.config.stash[STATE]
    state.start = time.monotonic()
    state.work = sum(map(_work, session.items))
    for item in session.items:
        if entry := _entry(item):
            state.entries[entry.case].append(entry)


def pytest_report_collectionfinish(config):
    counts = config.stash[STATE].deselected
    if counts:
        each = ", ".join(f"{count} of {name}" for name, count in counts.items())
        return f"deselected {counts.total()} cases of absent peers: {each}"
    return None


def _entry(item):
    return item.callspec.params.get("entry") if hasattr(item, "callspec") else None


def _contender(item):
    entry = _entry(item)
    return entry.contender if entry else None


def _work(item):
    """Return about how long an item takes, in units of a small one."""
    entry = _entry(item)
    return 1 + prod(entry.case.shape) / 4e6 if entry else 5


@pytest.fixture
def hand_over(request):
    """Return a function that gives an entry's rounds to pytest-benchmark."""
    state = request.config.stash[STATE]

    def hand_over(entry):
        if entry not in state.measured:
            _race(state, entry.case)
        result = state.measured[entry]
        if isinstance(result, Exception):
            raise result
        benchmark = request.getfixturevalue("benchmark")  # which complains if it is left unused
        benchmark.group = str(entry.case)
        benchmark.extra_info = {"contender": entry.contender, "case": asdict(entry.case)}
        replay(benchmark, result)

    return hand_over


def _race(state, case):
    calls = {}
    for entry in state.entries[case]:
        try:
            calls[entry] = entry.prepare()
        except Exception as problem:  # of one contender, not of the others
            state.measured[entry] = problem
    if state.timed and calls:
        enough = not state.full and time.monotonic() - state.start > ENOUGH
        rounds = bench.race(calls, tries=1 if enough else bench.TRIES)
        times = {entry.contender: bench.Timing.of(each) for entry, each in rounds.items()}
        state.rows.append(bench.Row(case, times))
    else:
        rounds = dict.fromkeys(calls, ())
    state.measured.update(rounds)


def pytest_report_teststatus(report):
    if report.when == "call" and report.passed:
        return "passed", "", "PASSED"  # the time left is shown instead of dots
    return None


def pytest_runtest_teardown(item):
    """Show how far the run is and how long the rest takes."""
    config, state = item.config, item.config.stash[STATE]
    state.done += _work(item)
    now, elapsed = time.monotonic(), time.monotonic() - state.start
    minutes, seconds = divmod(round(elapsed * (state.work / state.done - 1)), 60)
    text = f"{state.done / state.work:4.0%}, about {minutes} min {seconds:02} s left"
    name = item.callspec.id if hasattr(item, "callspec") else item.name
    reporter, capture = (
        config.pluginmanager.get_plugin(n) for n in ("terminalreporter", "capturemanager")
    )
    with capture.global_and_fixture_disabled():
        if reporter.isatty:
            reporter.rewrite(f"{text}: {name}"[: get_terminal_size().columns - 1], erase=True)
        elif now - state.told > EVERY:
            state.told = now
            reporter.write_line(text)
            reporter.flush()


def pytest_terminal_summary(terminalreporter, config):
    state = config.stash[STATE]
    if not state.rows:
        return
    table = [bench.header(state.versions)]
    rows = [row for row in state.rows if row.case.operation in MOVED]
    table += [bench.cells(line, state.versions) for line in bench.lines(rows)]
    columns = bench.widths(table)
    terminalreporter.section("fastbn beside others")
    for row in table:
        terminalreporter.write_line(bench.aligned(row, columns))
    terminalreporter.write_line(f"\n{bench.LEGEND}\n\n{bench.verdict(LOAD, state.rows)}")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cores"] = CORES
    machine_info["caches"] = fastbn.runtime_info()["caches"]
    machine_info["load_before"] = LOAD
    machine_info["versions"] = {"fastbn": fastbn.__version__, **config.stash[STATE].versions}
    machine_info["command"] = " ".join(["pytest", *sys.argv[1:]])
