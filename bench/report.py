"""Write the tables of README.md and docs/benchmarks.md, and the pictures in docs/, from saved runs.

pytest bench --benchmark-json=results.json && python bench/report.py results.json
"""

import argparse
import json
from collections import defaultdict
from math import prod
from pathlib import Path
from statistics import geometric_mean

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = ["plain", "numpy", "torch", "onednn", "jax", "tensorflow", "onnxruntime"]
COLOURS = dict(zip(["ceiling", "fastbn", *PEERS], ["0.5", *mpl.color_sequences["tab10"]]))  # noqa: B905
OUTPUTS = {"out": "out= given", "fresh": "fresh arrays"}


class Row:
    """One workload, operation, number of threads and kind of output: all its contenders."""

    def __init__(self, info):
        self.dtype, self.operation, self.layout = info["dtype"], info["operation"], info["layout"]
        self.threads, self.output = info["threads"], info["output"]
        self.family, self.count = info["family"], info["count"]
        self.shape, self.bytes = tuple(info["shape"]), info["bytes"]
        self.seconds, self.errors = {}, {}

    @property
    def group(self):
        return self.operation, self.layout, self.threads, self.output

    def speed(self, contender):
        return self.bytes / self.seconds[contender] / 1e9

    def ratio(self, peer):
        """How many times as long as fastbn the peer takes; fastbn against the ceiling: reversed."""
        mine, other = self.seconds["fastbn"], self.seconds[peer]
        return mine / other if peer == "ceiling" else other / mine


def load(paths):
    """Return the files, their rows, and what is no row; the last file that has one counts."""
    runs = [json.loads(Path(path).read_text()) for path in paths]
    rows, others = {}, {}
    for run in runs:
        raced = {}
        for benchmark in run["benchmarks"]:
            info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
            if "operation" in info:
                row = raced.setdefault(benchmark["group"], Row(info))
                row.seconds[info["contender"]] = seconds
                row.errors[info["contender"]] = info["error_eps"]
            else:
                others[benchmark["fullname"]] = info | {"seconds": seconds}
        rows |= raced
    complete = [row for row in rows.values() if "fastbn" in row.seconds]
    return runs, complete, list(others.values())


def time(seconds):
    for unit, size in [("s", 1), ("ms", 1e-3), ("us", 1e-6)]:
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def table(header, lines):
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def peers_in(rows):
    return [p for p in PEERS if any(p in row.seconds for row in rows)]


def summary(rows):
    """Geometric means over the workloads of each group; a ratio above 1 says fastbn is faster."""
    peers, lines = peers_in(rows), []
    for group, members in groups(rows):
        means = {
            peer: geometric_mean(ratios)
            for peer in ["ceiling", *peers]
            if (ratios := [row.ratio(peer) for row in members if peer in row.seconds])
        }
        cells = [f"{means[p]:.2f}" if p in means else "" for p in ["ceiling", *peers]]
        operation, layout, threads, output = group
        lines.append([operation, layout, threads, OUTPUTS[output], len(members), *cells])
    header = ["operation", "layout", "threads", "output", "shapes", "fastbn / ceiling"]
    return table(header + [f"{peer} / fastbn" for peer in peers], lines)


def groups(rows):
    found = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return found.items()


def network(rows):
    """Add up the batch norms of one pass through ResNet-50, for those who took part in all."""
    contenders, lines = ["ceiling", "fastbn", *peers_in(rows)], []
    for group, members in groups([row for row in rows if row.family == "ResNet-50"]):
        if sum(row.count for row in members) != 53:  # a run of only some shapes
            continue
        sums = [
            time(sum(row.count * row.seconds[c] for row in members))
            if all(c in row.seconds for row in members)
            else ""
            for c in contenders
        ]
        operation, layout, threads, output = group
        lines.append([operation, layout, threads, OUTPUTS[output], *sums])
    return table(["operation", "layout", "threads", "output", *contenders], lines) if lines else ""


def details(rows):
    """One line a row: time, bytes a second, ratios, and errors in units of rounding (eps)."""
    peers, lines = peers_in(rows), []
    for row in rows:
        cells = [
            f"{row.ratio(p):.2f}x" + (f", {row.errors[p]:.2g} eps" if row.errors[p] else "")
            if p in row.seconds
            else ""
            for p in peers
        ]
        start = [row.layout, row.shape, row.dtype, row.operation, row.threads, OUTPUTS[row.output]]
        mine = [time(row.seconds["fastbn"]), f"{row.speed('fastbn'):.3g}"]
        error = f"{row.errors['fastbn']:.2g} eps"
        ceiling = f"{row.ratio('ceiling'):.2f}" if "ceiling" in row.seconds else ""
        lines.append([*start, *mine, ceiling, error, *cells])
    header = ["layout", "x", "dtype", "operation", "threads", "output"]
    header += ["fastbn", "GB/s", "/ ceiling", "error", *peers]
    return table(header, lines)


def others_table(others):
    lines = [
        [f"{info['small']}, x of (64, 64)", info["contender"], time(info["seconds"])]
        for info in others
        if "small" in info
    ] + [
        [
            f"in turns with matmul of {info['size']} squared, {info['threads']} threads",
            info["contender"],
            f"{info['ratio_to_alone']:.2f} times the sum of both alone",
        ]
        for info in others
        if "ratio_to_alone" in info
    ]
    return table(["small calls, and beside BLAS", "contender", "median"], lines) if lines else ""


def conditions(runs):
    about = []
    for run in runs:
        machine = run["machine_info"]
        versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
        about.append(
            f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cores']} cores, "
            f"load average {machine['load_before']:.1f} before; "
            f"Python {machine['python_version']}, {versions}; {run['datetime'][:10]}; "
            f"commit {run['commit_info']['id'][:10]}; `{machine['command']}`"
        )
    return "Measured on: " + "; and ".join(dict.fromkeys(about)) + "."


EXPLANATION = (
    "The ceiling is `np.copyto` (for backward `np.add`) over the same bytes with the same number "
    "of threads; GB/s count these bytes. Peers: how many times as long as fastbn they take; below "
    "1 fastbn loses. `forward_relu` and so on are fused with ReLU, and with the addition of a "
    "residual before it; `plain` is fastbn with nothing fused, torch takes the steps one by one. "
    "CM is the course's (n_h, m). Means are geometric. Errors are the largest over the largest "
    "value, in eps of the dtype."
)


def save_size(rows, folder):
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.5), sharey=True, layout="constrained")
    threads = max(row.threads for row in rows)
    for axis, operation in zip(axes, ["forward", "backward"], strict=True):
        chosen = [
            r for r in rows if (r.operation, r.threads, r.output) == (operation, threads, "out")
        ]
        for contender in COLOURS:
            points = [
                (prod(r.shape) * 4 / 1e6, r.speed(contender))
                for r in chosen
                if contender in r.seconds
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    "o",
                    ms=4,
                    alpha=0.7,
                    color=COLOURS[contender],
                    label=contender,
                )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="size of x, MB",
            title=f"{operation}, {threads} threads",
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s read and written")
    axes[0].legend()
    save(figure, folder / "speed_against_size.png")


def save_threads(rows, folder):
    """Geometric means over all large images, where threads can help."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 4.5), sharey=True, layout="constrained")
    for axis, operation in zip(axes, ["forward", "backward", "inference"], strict=True):
        speeds = defaultdict(list)
        for row in rows:
            if row.operation == operation and row.output == "out" and row.family == "ResNet-50":
                for contender in row.seconds:
                    speeds[contender, row.threads].append(row.speed(contender))
        threads = sorted({n for _, n in speeds})
        for contender in COLOURS:
            means = [
                geometric_mean(speeds[contender, n]) for n in threads if (contender, n) in speeds
            ]
            if len(means) == len(threads) > 0:
                axis.plot(threads, means, "o-", color=COLOURS[contender], label=contender)
        axis.set(title=operation, xlabel="threads", xticks=threads)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s, geometric mean over ResNet-50")
    axes[0].set_ylim(bottom=0)
    axes[-1].legend()  # everyone has inference
    save(figure, folder / "speed_against_threads.png")


def save_errors(others, folder):
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for info in (info for info in others if "errors" in info):
        means, errors = zip(*info["errors"], strict=True)
        dashed = (info["contender"], info["layout"]) == ("torch", "NHWC")
        label = f"{info['contender']}, channels-last" if dashed else info["contender"]
        colour = COLOURS[info["contender"]]
        axis.plot(means, errors, "o--" if dashed else "o-", color=colour, label=label)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(yscale="log", xlabel="mean / standard deviation", ylabel="error of y, float32 eps")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, folder / "error_against_mean.png")


def save(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="files that --benchmark-json has written")
    root = Path(__file__).parents[1]
    parser.add_argument("--root", type=Path, default=root, help="where README.md and docs/ are")
    arguments = parser.parse_args()
    runs, rows, others = load(arguments.results)
    docs = arguments.root / "docs"

    singles = [row for row in rows if row.dtype == "float32"]
    threads = max(row.threads for row in rows)
    compact = [row for row in singles if (row.output, row.threads) == ("out", threads)]
    top = [EXPLANATION, summary(singles), network(singles), others_table(others)]
    full = "\n\n".join(part for part in [*top, details(rows), conditions(runs)] if part)
    (docs / "benchmarks.md").write_text(f"# Benchmarks\n\n{full}\n")
    fold = f"<details><summary>Every shape, float32, `out=`, {threads} threads</summary>"
    parts = [*top, fold, details(compact), "</details>", conditions(runs)]

    readme = arguments.root / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    text = "\n\n".join(part for part in [BEGIN, *parts, END] if part)
    readme.write_text(before + text + after)

    save_size(singles, docs)
    save_threads(singles, docs)
    save_errors(others, docs)


if __name__ == "__main__":
    main()
