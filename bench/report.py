"""Write docs/benchmarks.csv, and what README.md says and shows of it, from a run's file.

pytest bench --benchmark-json=results.json && python bench/report.py results.json
python bench/report.py --check

The second tells whether README.md says what the CSV holds. The pages of docs/ take their tables
and pictures from the CSV when they are built (`write_pages`).

A run on a busy machine is refused, and so is one with uneven rounds. These cases alone can be
measured again (`pytest bench -k CASE`): give all files. Of each case the most even run counts.
"""

import argparse
import csv
import io
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from math import nan, prod
from pathlib import Path

import matplotlib as mpl

from fastbn.cli import bench
from fastbn.cli.bench import Row, Timing
from fastbn.cli.cases import FUSED, MOVED, PLAIN, Case

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {
    "ceiling": "ceiling", "fastbn": "fastbn", "numpy": "NumPy", "torch": "PyTorch",
    "onednn": "oneDNN", "jax": "JAX", "tensorflow": "TensorFlow", "onnxruntime": "ONNX Runtime",
}  # fmt: skip
# Colours of Okabe and Ito, which those who do not see all colours tell apart, too.
STYLES = {
    "ceiling": ("#000000", "_"), "fastbn": ("#D55E00", "o"), "numpy": ("#0072B2", "s"),
    "torch": ("#009E73", "^"), "onednn": ("#CC79A7", "D"), "jax": ("#E69F00", "v"),
    "tensorflow": ("#56B4E9", "P"), "onnxruntime": ("#7F7F7F", "X"),
}  # fmt: skip
LARGE = 1e6  # bytes of x: below, a call costs more than the bytes
OF_CASE = [each.name for each in fields(Case)]
COLUMNS = [*OF_CASE, "contender", "median_s", "fastest_s", "slowest_s", "mean", "error_eps"]


@dataclass
class Report:
    """A run: times of all cases, errors of y by (contender, case), and where it was measured."""

    machine: str = ""
    rows: list[Row] = field(default_factory=list)
    errors: dict[tuple[str, Case], list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def timed(self):
        return [row for row in self.rows if row.case.operation in MOVED]

    @property
    def peers(self):
        return [name for name in TITLES if any(name in row.times for row in self.timed)][2:]

    @property
    def threads(self):
        return max(row.case.threads for row in self.timed)

    @property
    def lines(self):
        return bench.lines(self.timed)


# Runs and the CSV.


def add_run(report, path):
    """Add a file of --benchmark-json to a report; return the load before and the number of CPUs."""
    run, rows = json.loads(Path(path).read_text(encoding="utf-8")), {}
    for each in run["benchmarks"]:
        info, stats = each["extra_info"], each["stats"]
        if "case" not in info:  # test_ranks.py
            continue
        case = Case(**info["case"] | {"shape": tuple(info["case"]["shape"])})
        if "errors" in info:
            report.errors[info["contender"], case] = [tuple(e) for e in info["errors"]]
        else:
            row = rows.setdefault(case, Row(case, {}))
            row.times[info["contender"]] = Timing(stats["median"], stats["min"], stats["max"])
    for row in report.rows:
        if row.case not in rows or row.spread <= rows[row.case].spread:
            rows[row.case] = row
    report.rows = list(rows.values())
    machine = run["machine_info"]
    load, cores = machine["load_before"], machine["cores"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    report.machine = report.machine or (
        f"{machine['cpu'].get('brand_raw') or machine['machine']}, {cores} CPUs, "
        f"caches {machine['caches']} (load {load:.1f} "
        f"before); Python {machine['python_version']}, {versions}; {run['datetime'][:10]}, "
        f"commit {run['commit_info']['id'][:10]}"
    )
    return load, cores


def to_csv(report):
    text = io.StringIO()
    text.write(f"# {report.machine}\n")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        case = written(row.case)
        for name, t in row.times.items():
            seconds = {"median_s": t.median, "fastest_s": t.fastest, "slowest_s": t.slowest}
            digits = {key: f"{value:.4g}" for key, value in seconds.items()}
            writer.writerow({**case, "contender": name, **digits})
    for (name, case), errors in report.errors.items():
        for mean, error in errors:
            what = {"contender": name, "mean": f"{mean:g}", "error_eps": f"{error:.3g}"}
            writer.writerow(written(case) | what)
    return text.getvalue()


def written(case):
    return asdict(case) | {"shape": "x".join(map(str, case.shape))}


def from_csv(text):
    first, _, table = text.partition("\n")
    report, rows = Report(machine=first.removeprefix("# ")), {}
    for line in csv.DictReader(io.StringIO(table)):
        given = {name: line[name] for name in OF_CASE}
        given["shape"] = tuple(map(int, line["shape"].split("x")))
        given |= {name: int(line[name]) for name in ("threads", "count")}
        case = Case(**given)
        if line["error_eps"]:
            point = (float(line["mean"]), float(line["error_eps"]))
            report.errors.setdefault((line["contender"], case), []).append(point)
            continue
        seconds = (float(line[name]) for name in ("median_s", "fastest_s", "slowest_s"))
        rows.setdefault(case, Row(case, {})).times[line["contender"]] = Timing(*seconds)
    report.rows = list(rows.values())
    return report


# What README.md says.


def readme_section(report):
    """Return what stands between the marks."""
    peers = report.peers
    skipped = bench.header([]).index("threads")
    table = [bench.header(TITLES[peer] for peer in peers)]
    table += [bench.cells(line, peers) for line in chosen(report)]
    for row in table:
        del row[skipped]
    return "\n\n".join(
        [
            BEGIN,
            f"float32 on {report.threads} threads; {report.machine}.",
            markdown(table),
            "A sum adds the times of that many of the 53 batch norms of a ResNet-50 at batch 32. "
            "Of ceiling: 100 % is NumPy copying x (or adding two arrays) on as many threads. Other "
            "libraries: how many times as long as fastbn they take; below 1 they are faster.",
            "![How many times as long as copying each library takes](docs/speed.png)",
            where_it_loses(report),
            END,
        ]
    )


def chosen(report):
    """Return the lines of README's table, eight at most."""
    wanted = [(operation, layout) for operation in PLAIN for layout in ("NCHW", "NHWC")]
    wanted += [("forward_add_relu", "NCHW"), ("forward", "NC")]
    return [
        line
        for line in report.lines
        if line.case.family in ("ResNet-50", "one call")
        and line.case.threads == report.threads
        and (line.case.operation, line.case.layout) in wanted
    ]


def where_it_loses(report):
    """Say it in two sentences: to whom, and in which cases the ceiling is far."""
    rows = [
        row
        for row in report.timed
        if (row.case.dtype, row.case.threads) == ("float32", report.threads)
        and "fastbn" in row.times
    ]
    lost, worst, compared = [], (1.0, ""), 0
    for peer in report.peers:
        ratios = {
            row.case: row.times["fastbn"].median / row.times[peer].median
            for row in rows
            if peer in row.times
        }
        compared += len(ratios)
        slower = sum(ratio > 1 for ratio in ratios.values())
        if slower:
            lost.append(f"to {TITLES[peer]} in {slower} of {len(ratios)}")
            case = max(ratios, key=ratios.get)
            worst = max(worst, (ratios[case], f"{TITLES[peer]}: {spoken(case)}"))
    if lost:
        first = (
            f"Case by case, fastbn loses {', '.join(lost)}; at worst it takes {worst[0]:.2g} "
            f"times as long ({worst[1]})."
        )
    else:
        first = f"Case by case, fastbn loses none of {compared} comparisons."
    far = {
        row.case: row.times["fastbn"].median / row.times["ceiling"].median
        for row in rows
        if "ceiling" in row.times and prod(row.case.shape) * 4 >= LARGE
    }
    case = max(far, key=far.get)
    return (
        f"{first} On arrays of 1 MB and more it is farthest from the ceiling in {spoken(case)}, "
        f"with {far[case]:.2g} times its time."
    )


def spoken(case):
    operation = bench.NAMES.get(case.operation, case.operation)
    return f"{operation} on {case.layout} {case.shape}"


def markdown(table):
    header, *rows = table
    marks = ["---" if i < 3 else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, marks, *rows])


def put(readme, section):
    before, rest = readme.split(BEGIN)
    return before + section + rest.split(END)[1]


# Pictures.


def draw_lines(report, path):
    """Draw README's table: time over the ceiling's, a row for each operation and layout."""
    lines = [line for line in chosen(report) if "ceiling" in line.seconds]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.axvline(1, color=STYLES["ceiling"][0], lw=1, label="ceiling (copy or add)")
    for name in ("fastbn", *report.peers):
        points = [
            (line.seconds[name] / line.seconds["ceiling"], place)
            for place, line in enumerate(lines)
            if name in line.seconds
        ]
        plot(axis, name, points, markersize=8)
    named = (bench.cells(line, [])[:3] for line in lines)
    labels = [f"{name} {over if over[:3] == 'one' else layout}" for name, layout, over in named]
    axis.set_yticks(range(len(lines)), labels)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="times as long as the ceiling; further left is faster")
    number_ticks(axis.xaxis)
    finish(figure, [axis], path)


def draw_sizes(report, operations, path):
    """Draw GB/s over the size of x, a panel for each operation and layout."""
    panels = [(operation, layout) for operation in operations for layout in ("NCHW", "NHWC")]
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    for axis, (operation, layout) in zip(axes, panels, strict=True):
        rows = [
            row
            for row in report.timed
            if (row.case.operation, row.case.layout, row.case.threads, row.case.dtype)
            == (operation, layout, report.threads, "float32")
        ]
        rows.sort(key=lambda row: prod(row.case.shape))
        for name in ("ceiling", "fastbn", *report.peers):
            points = [
                (prod(row.case.shape) * 4e-6, row.case.bytes / row.times[name].median / 1e9)
                for row in rows
                if name in row.times
            ]
            plot(axis, name, points, markersize=7)
        title = f"{bench.NAMES.get(operation, operation)}, {layout}, {report.threads} threads"
        axis.set(xscale="log", yscale="log", xlabel="size of x, MB", title=title)
        number_ticks(axis.xaxis)
        number_ticks(axis.yaxis)
    axes[0].set_ylabel("GB/s read and written")
    finish(figure, axes, path)


def draw_errors(report, path):
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for (name, case), points in report.errors.items():
        if len(points) == 1:
            continue
        other = (name, case.layout) == ("torch", "NHWC")
        label = f"{TITLES[name]}, channels last" if other else TITLES[name]
        line = "--" if other else "-"
        plot(axis, name, points, linestyle=line, label=label, markersize=7)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(yscale="log", xlabel="mean / standard deviation", ylabel="error of y, float32 eps")
    finish(figure, [axis], path)


def number_ticks(logarithmic):
    """Write 1, 2, 5, 10 and so on beside an axis."""
    logarithmic.set_major_locator(LogLocator(subs=(1, 2, 5)))
    logarithmic.set_major_formatter("{x:g}")
    logarithmic.set_minor_formatter(NullFormatter())


def plot(axis, name, points, linestyle="", **options):
    if points:
        colour, marker = STYLES[name]
        options = {
            "label": TITLES[name],
            "alpha": 0.85,
            "mew": 2 if marker == "_" else 1,
            **options,
        }
        axis.plot(*zip(*points, strict=True), marker, ls=linestyle, color=colour, **options)


def finish(figure, axes, path):
    for axis in axes:
        axis.grid(alpha=0.3)
    shown = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The pages.


def write_pages(docs):
    """Write the tables and pictures that docs/benchmarks.md includes into docs/bench/."""
    report, folder = from_csv((docs / "benchmarks.csv").read_text(encoding="utf-8")), docs / "bench"
    folder.mkdir(exist_ok=True)
    (folder / "machine.txt").write_text(f"Measured on {report.machine}.\n", encoding="utf-8")
    shown = [
        line
        for line in report.lines
        if line.case.dtype == "float32"
        and (line.case.family == "ResNet-50" or line.case.threads == report.threads)
    ]
    sections = {name: [name] for name in PLAIN} | {"fused": FUSED}
    for name, operations in sections.items():
        lines = [line for line in shown if line.case.operation in operations]
        lines = [line for line in lines if line.case.family != "one call"]
        write_table(folder / f"{name}.txt", lines, report.peers, first=name != "fused")
        draw_sizes(
            report, operations if name != "fused" else ["forward_add_relu"], folder / f"{name}.png"
        )
    calls = [line for line in shown if line.case.family == "one call"]
    write_table(folder / "call.txt", calls, report.peers)
    (folder / "blas.txt").write_text(markdown(beside_blas(report)) + "\n", encoding="utf-8")
    (folder / "reader.txt").write_text(markdown(and_reader(report)) + "\n", encoding="utf-8")
    (folder / "errors.txt").write_text(markdown(errors(report)) + "\n", encoding="utf-8")
    draw_errors(report, folder / "error_against_mean.png")


def write_table(path, lines, peers, first=False):
    """Write a table; without its first column where that says the same in each line."""
    peers = [peer for peer in peers if any(peer in line.seconds for line in lines)]
    table = [bench.header(TITLES[peer] for peer in peers)]
    table += [bench.cells(line, peers) for line in lines]
    path.write_text(markdown([row[first:] for row in table]) + "\n", encoding="utf-8")


def errors(report):
    """Return the table of errors by layout and number of threads."""
    found = {}
    for (name, case), points in report.errors.items():
        if len(points) == 1:
            found.setdefault(case, {})[name] = points[0][1]
    names = [name for name in TITLES if any(name in each for each in found.values())]
    table = [["layout", "x", "threads", *(TITLES[name] for name in names)]]
    for case, each in found.items():
        shown = (f"{float(f'{each[n]:.2g}'):,g} eps" if n in each else "" for n in names)
        table.append([case.layout, str(case.shape), str(case.threads), *shown])
    return table


def beside_blas(report):
    """Return the table of norms that take turns with a matrix product."""
    times = {(row.case.operation, row.case.shape): row.times for row in report.rows}
    table = [["matrices", "x", "library", "in turns, over one after the other"]]
    for (operation, shape), turns in times.items():
        product, _, how = operation.partition("_")
        if how == "in_turns":
            apart = times[f"{product}_apart", shape]
            size = product.removeprefix("matmul")
            for name in turns:
                ratio = turns[name].median / apart[name].median
                table.append([f"{size} squared", str(shape), TITLES[name], f"{ratio:.2f}"])
    return table


def and_reader(report):
    """Return the table of norms whose result is read once, over copying and the same reader."""
    table = [["operation", "layout", "x", "over copy (add) and reader"]]
    for row in report.rows:
        what, _, how = row.case.operation.partition("_")
        if how == "and_reader":
            ratio = row.times["fastbn"].median / row.times["ceiling"].median
            table.append([what, row.case.layout, str(row.case.shape), f"{ratio:.2f}"])
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", help="files that --benchmark-json has written")
    parser.add_argument("--check", action="store_true", help="compare README.md with the CSV")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    arguments = parser.parse_args()
    if arguments.check == bool(arguments.results):
        parser.error("expected a file of results, or --check")
    table, readme = arguments.root / "docs" / "benchmarks.csv", arguments.root / "README.md"
    if arguments.results:
        report = Report()
        for path in arguments.results:
            load, cores = add_run(report, path)
            refuse(bench.doubts(load, [], cores))
        refuse(bench.doubts(nan, report.rows))
        table.write_text(to_csv(report), encoding="utf-8")
        report = from_csv(table.read_text(encoding="utf-8"))
        readme.write_text(
            put(readme.read_text(encoding="utf-8"), readme_section(report)), encoding="utf-8"
        )
        draw_lines(report, arguments.root / "docs" / "speed.png")
        return
    report = from_csv(table.read_text(encoding="utf-8"))
    refuse(bench.doubts(nan, report.rows))
    if put(readme.read_text(encoding="utf-8"), readme_section(report)) != readme.read_text(
        encoding="utf-8"
    ):
        refuse(["README.md does not say what docs/benchmarks.csv holds: run bench/report.py"])


def refuse(reasons):
    if reasons:
        sys.exit("refused:\n" + "\n".join(f"- {reason}" for reason in reasons))


if __name__ == "__main__":
    main()
