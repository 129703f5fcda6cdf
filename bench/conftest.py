"""Let the selected contenders of a heat race when its first test asks; note what they ran on."""

import os
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version

import pytest
from race import race, replay
from workloads import CORES

import fastbn

LIBRARIES = [
    "numpy", "torch", "jax", "tensorflow", "tensorflow-cpu", "onnxruntime", "pytest-benchmark",
]  # fmt: skip

# Before this run adds its own: beside another process that computes, a library whose threads wait
# for each other takes ten times as long at all cores, and the comparison is worth nothing.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


@pytest.fixture(scope="session")
def results(request):
    """Return a function from an entry to what its heat gave: (durations, information), or why not.

    An entry is a parameter `entry` of a test with a heat, hashable, whose method `prepare(entry)`
    returns what to time and the information about it. Entries of one heat run in one race.
    """
    fields = defaultdict(list)
    for item in request.session.items:
        entry = item.callspec.params.get("entry") if hasattr(item, "callspec") else None
        if entry is not None:
            fields[entry.heat].append(entry)
    timed = not request.config.getoption("benchmark_disable")
    known = {}

    def result(entry):
        if entry not in known:
            known.update(_run(entry.heat, fields[entry.heat], timed))
        return known[entry]

    return result


def _run(heat, entries, timed):
    calls, information, known = {}, {}, {}
    for entry in entries:
        try:
            calls[entry], information[entry] = heat.prepare(entry)
        except Exception as problem:  # of one contender, not of the others
            known[entry] = problem
    durations = race(calls) if timed else dict.fromkeys(calls, ())
    return known | {entry: (durations[entry], information[entry]) for entry in calls}


@pytest.fixture
def hand_over(results, request):
    def hand_over(entry):
        result = results(entry)
        if isinstance(result, ImportError):
            pytest.skip(f"{entry.contender}: {result}")
        if isinstance(result, Exception):
            raise result
        benchmark = request.getfixturevalue("benchmark")  # which complains if it is left unused
        benchmark.group = str(entry.heat)
        durations, benchmark.extra_info = result
        replay(benchmark, durations)

    return hand_over


def pytest_benchmark_update_machine_info(machine_info):
    versions = {"fastbn": fastbn.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine_info["cores"] = CORES
    machine_info["load_before"] = LOAD
    machine_info["versions"] = versions
    machine_info["command"] = " ".join(["pytest", *sys.argv[1:]])
