"""Compare the speed of fastbn at two commits, with the benchmarks as they are in this tree.

python bench/compare.py v0.1 HEAD -k "forward and nchw and out"
python bench/compare.py before.json after.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median

ROOT = Path(__file__).resolve().parents[1]


def build(commit, folder):
    """Return the Python of a new environment with fastbn as of this commit."""
    run(["git", "-C", ROOT, "worktree", "add", "--detach", folder / "source", commit])
    try:
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        requirements = [f"{folder / 'source'}[bench]", "ml_dtypes"]  # early commits: without
        run([python, "-m", "pip", "install", "--quiet", *requirements])
    finally:
        run(["git", "-C", ROOT, "worktree", "remove", "--force", folder / "source"])
    return python


def measure(python, selection, path):
    # -P, and not in ROOT: the fastbn that counts is the installed one.
    command = [python, "-P", "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", ROOT / "bench"]
    command += ["-p", "no:cacheprovider", "-k", f"fastbn and ({selection})"]
    run([*command, f"--benchmark-json={path}"], cwd=path.parent, stdout=subprocess.DEVNULL)
    return load(path)


def run(command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def load(path):
    benchmarks = json.loads(Path(path).read_text())["benchmarks"]
    return {b["name"]: b["stats"]["median"] for b in benchmarks}


def compare(old, new):
    """Print the ratio of medians of each benchmark; `old` and `new` are lists of runs."""
    ratios = []
    for name in old[0]:
        if all(name in run for run in old + new):
            before, after = ([run[name] for run in runs] for runs in (old, new))
            ratios.append(median(after) / median(before))
            spread = max(max(times) / min(times) for times in (before, after))
            print(f"{ratios[-1]:6.3f}  (runs of one commit differ up to {spread:.2f}x)  {name}")
    if not ratios:
        sys.exit("no benchmark is in both")
    print(f"{geometric_mean(ratios):6.3f}  geometric mean; below 1, NEW is faster")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit, or a file of --benchmark-json")
    parser.add_argument("new", metavar="NEW", help="the same")
    parser.add_argument("-k", default="test_operation", help="as pytest's -k: which benchmarks")
    parser.add_argument("--runs", type=int, default=3, help="of each commit, taking turns")
    arguments = parser.parse_args()
    sides = [arguments.old, arguments.new]
    if all(side.endswith(".json") for side in sides):
        compare(*([load(side)] for side in sides))
        return
    with tempfile.TemporaryDirectory() as temporary:
        pythons, results = {}, defaultdict(list)
        for name, commit in zip(("old", "new"), sides, strict=True):
            folder = Path(temporary) / name
            folder.mkdir()
            pythons[name] = build(commit, folder)
        for turn in range(arguments.runs):
            for name in sorted(pythons, reverse=turn % 2 == 0):
                path = Path(temporary) / name / "results.json"
                results[name].append(measure(pythons[name], arguments.k, path))
        compare(results["old"], results["new"])


if __name__ == "__main__":
    main()
