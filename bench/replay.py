"""Give recorded rounds to pytest-benchmark, which keeps statistics and files of them.

pytest-benchmark times one test after another, so a minute of noise would fall on one contender
alone, and the idle threads of one library spin on the CPU that the next one needs. So the
contenders take turns (`fastbn.cli.bench.race`), and a clock replays what was measured.
"""

_ticks = []


def replay_clock():
    return _ticks.pop()


def replay(benchmark, rounds):
    """Let a benchmark, timed by `replay_clock`, find these seconds per call."""
    _ticks[:] = [tick for each in reversed(rounds) for tick in (each, 0.0)]
    benchmark.pedantic(lambda: None, rounds=max(1, len(rounds)))
