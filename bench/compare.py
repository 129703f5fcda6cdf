"""Compare the speed of fastbn at two commits, by their public functions alone.

python bench/compare.py v0.1 HEAD

Each commit is installed into an environment of its own. A process of each stays open, and they
take turns, so that noise falls on both. It takes some ten minutes, and means something on a quiet
machine only.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections import defaultdict
from functools import partial
from math import ceil
from pathlib import Path
from statistics import geometric_mean, median
from timeit import Timer

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7
BLOCK = 0.02  # seconds; a round is as many calls as fill it
REST = 0.01
SIZES = [  # of ResNet-50's images: channels, height = width
    (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
    (2048, 7),
]  # fmt: skip
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CASES = [
    *(
        (operation, layout, (32, c, h, h) if layout == "NCHW" else (32, h, h, c), threads)
        for operation in ("forward", "backward")
        for layout in ("NCHW", "NHWC")
        for threads in sorted({1, CPUS})
        for c, h in SIZES
    ),
    ("function", "NC", (64, 64), 1),
    ("layer", "NC", (64, 64), 1),
]


def work():
    """Answer each case and number of calls on a line with the seconds of a call."""
    known = None
    for line in sys.stdin:
        case, number = json.loads(line)
        if case != known:
            known, call = case, prepare(*case)
        call()
        print(Timer(call).timeit(number) / number, flush=True)


def prepare(operation, layout, shape, threads):
    import numpy as np

    import fastbn

    fastbn.set_num_threads(threads)
    axis = 1 if layout in ("NCHW", "NC") else -1
    some = np.random.default_rng(0).standard_normal((2, 65_537), dtype=np.float32)
    x, dy = (np.resize(each, shape) for each in some)
    gamma, beta = np.ones((2, shape[axis]), np.float32)
    out = np.zeros_like(x)
    if operation == "layer":
        return partial(fastbn.BatchNorm(shape[axis]), x)
    if operation == "function":
        return partial(fastbn.batch_norm, x, gamma, beta)
    forward = partial(fastbn.batch_norm, x, gamma, beta, axis=axis, out=out)
    if operation == "forward":
        return forward
    _, cache = forward()
    return partial(fastbn.batch_norm_backward, dy, cache, out=np.zeros_like(x))


class Worker:
    """A process that measures one commit."""

    def __init__(self, python):
        command = [python, "-P", __file__, "--work"]  # -P: the installed fastbn, not that beside
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=Path(python).parent, **pipes)

    def seconds(self, case, number):
        time.sleep(REST)
        self.process.stdin.write(json.dumps([case, number]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the process of {self.process.args[0]} has ended")
        return float(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def build(commit, folder):
    """Return the Python of a new environment with fastbn as of this commit."""
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", "--format=tar", commit], check=True, capture_output=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder / "source", filter="data")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [python, "-m", "pip", "install", "--quiet", folder / "source"]
    subprocess.run(command, check=True)
    return str(python)


def measure(pythons, times):
    """Let two new processes take turns over all cases; add to the times of (case, side)."""
    workers = [Worker(python) for python in pythons]
    try:
        for case in CASES:
            number = ceil(BLOCK / min(worker.seconds(case, 1) for worker in workers))
            for turn in range(ROUNDS):
                for side in (0, 1) if turn % 2 else (1, 0):
                    times[case, side].append(workers[side].seconds(case, number))
    finally:
        for worker in workers:
            worker.close()


def tell(times):
    """Print the ratio of medians of each case, and means; below 1 the new commit is faster."""
    ratios = defaultdict(list)
    print("new / old   old, ms   spread  case")
    for case in CASES:
        sides = [times[case, side] for side in (0, 1)]
        old, new = map(median, sides)
        spread = max(max(side) / min(side) for side in sides)
        operation, layout, shape, threads = case
        ratios[operation, layout, threads].append(new / old)
        what = f"{operation} {layout} {shape}, {threads} threads"
        print(f"{new / old:9.3f} {old * 1e3:9.4g} {spread:7.2f}x  {what}")
    print("\nGeometric means over the shapes:")
    for (operation, layout, threads), members in ratios.items():
        mean = geometric_mean(members)
        print(f"{mean:9.3f}  {operation} {layout}, {threads} threads, {len(members)} shapes")
    every = [ratio for members in ratios.values() for ratio in members]
    print(f"{geometric_mean(every):9.3f}  all {len(every)} cases; below 1, NEW is faster")


def main():
    if sys.argv[1:] == ["--work"]:
        work()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="another")
    parser.add_argument("--runs", type=int, default=3, help="with new processes each (3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pythons = []
        for name, commit in (("old", arguments.old), ("new", arguments.new)):
            folder = Path(temporary) / name
            folder.mkdir()
            pythons.append(build(commit, folder))
        times = defaultdict(list)
        for _ in range(arguments.runs):
            measure(pythons, times)
    tell(times)


if __name__ == "__main__":
    main()
