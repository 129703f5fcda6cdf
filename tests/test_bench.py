"""The tables of `fastbn bench` and of bench/, and when their numbers are refused; nothing timed."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn.cli import bench, cases, peers
from fastbn.cli.bench import Row, Timing
from fastbn.cli.cases import Case

ROOT = Path(__file__).parent.parent
ACCURACY = Case("forward", "NCHW", (4, 4), 2, family="accuracy")
OPERATIONS = (*cases.PLAIN, "layer", *cases.FUSED)


@pytest.fixture
def report():
    pytest.importorskip("matplotlib")
    return importlib.import_module("report")


@pytest.fixture
def hurried(monkeypatch):
    """Let a round be one call, without a rest before it."""
    monkeypatch.setattr(bench, "REST", 0)
    monkeypatch.setattr(bench, "BLOCK", 1e-9)
    before = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(before)


def steady(seconds):
    return Timing(seconds, seconds, 1.5 * seconds)


def a_run():
    """Return rows as a run has them: fastbn takes 10 ms, torch 30, oneDNN 8, and so on."""
    short = [case for line in cases.short_cases(2) for case in line]
    blas = [
        Case(f"matmul256_{how}", "NC", (256, 256), 2, family="beside BLAS")
        for how in ("in_turns", "apart")
    ]
    more = [Case("backward_add_relu", layout, (32, 8, 8, 8), 2) for layout in ("NCHW", "NHWC")]
    times = {"ceiling": 0.009, "fastbn": 0.01, "numpy": 0.1, "torch": 0.03, "onednn": 0.008}
    return [
        Row(case, {name: steady(t) for name, t in times.items() if name != "onednn" or n == 10})
        for n, case in enumerate([*short, *more, *blas])
    ]


# The table.


def test_a_line_of_a_network_is_a_sum():
    first, second = cases.images("forward", "NCHW", 2, [(64, 56), (256, 14)])
    rows = [
        Row(first, {"fastbn": steady(1e-3), "numpy": steady(5e-3), "torch": steady(1e-3)}),
        Row(second, {"fastbn": steady(2e-3), "numpy": steady(8e-3)}),
    ]
    (line,) = bench.lines(rows)
    assert line.over == "sum of 17 norms"
    assert line.seconds == pytest.approx({"fastbn": 6e-3 + 22e-3, "numpy": 30e-3 + 88e-3})
    moved = 6 * first.bytes + 11 * second.bytes
    assert first.bytes == 2 * 4 * 32 * 64 * 56 * 56
    assert line.speed == pytest.approx(moved / 28e-3 / 1e9)
    assert bench.cells(line, ["numpy", "torch"]) == [
        "forward", "NCHW", "sum of 17 norms", "2", "28 ms", f"{line.speed:.3g}", "", "4.21x", ""
    ]  # fmt: skip


def test_a_line_of_other_shapes_is_a_geometric_mean():
    rows = [
        Row(Case("backward", "NC", (n, 8), 1, "float16", family="MLP"), {
            "ceiling": steady(t / 2), "fastbn": steady(t)
        })
        for n, t in [(10, 1e-6), (1000, 1e-4)]
    ]  # fmt: skip
    (line,) = bench.lines(rows)
    assert bench.cells(line, []) == [
        "backward", "NC float16", "MLP, geo. mean of 2", "1", "10 us", "0.48", "50 %"
    ]  # fmt: skip


def test_lines_stand_in_one_order_and_need_fastbn():
    rows = a_run()[:-2]
    lines = bench.lines(reversed(rows))
    assert [(line.case.operation, line.case.layout) for line in lines[:3]] == [
        ("forward", "NCHW"), ("forward", "NHWC"), ("backward", "NCHW")
    ]  # fmt: skip
    assert lines[-1].over == "one (64, 64)"
    for row in rows:
        del row.times["fastbn"]
    assert bench.lines(rows) == []


def test_the_short_table_has_eight_lines():
    assert len(cases.short_cases(2)) == 8
    assert sum(cases.RESNET50.values()) == 53


@pytest.mark.parametrize(
    ("seconds", "text"), [(2, "2 s"), (0.0123, "12.3 ms"), (4e-6, "4 us"), (123e-9, "123 ns")]
)
def test_a_duration_has_its_unit(seconds, text):
    assert bench.duration(seconds) == text


# Whether to believe it.


def test_a_quiet_machine_is_believed():
    rows = a_run()
    assert bench.doubts(0.5, rows, cores=2) == []
    assert bench.verdict(0.5, rows, cores=2) == (
        "The machine was quiet: load 0.5 before, rounds of a case differ by 1.5 times at most."
    )
    assert "load not known" in bench.verdict(float("nan"), rows)


def test_load_and_uneven_rounds_are_doubted():
    rows = a_run()
    rows[0].times["torch"] = Timing(2e-3, 1e-3, 3.1e-3)
    (load, spread) = bench.doubts(0.9, rows, cores=2)
    assert load == "the machine was busy before: load 0.9 on 2 CPUs"
    assert spread == f"rounds of torch in {rows[0].case} differ by 3.1 times"
    assert bench.verdict(0.9, rows, 2) == f"Do not believe this table: {load} (and 1 more such)."


def test_uneven_rounds_are_measured_again(monkeypatch):
    answers = iter([[1, 1, 9, 1, 1, 1], [1, 1, 2, 1, 1, 1]])
    blocks = []

    def block(_call, size):
        if size == 1:
            return 1e-6
        if not blocks:
            blocks[:] = next(answers)
        return blocks.pop()

    monkeypatch.setattr(bench, "_block", block)
    assert sorted(bench.race({"a": lambda: None}, rounds=6)["a"]) == [1, 1, 1, 1, 1, 2]


def test_contenders_take_turns(hurried):
    turns = []
    seconds = bench.race({name: (lambda name=name: turns.append(name)) for name in "ab"}, tries=1)
    assert all(len(each) >= 2 for each in seconds.values())
    assert set(turns[-4:]) == {"a", "b"}  # two calls each in the last round


# Contenders.


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("layout", "shape"),
    [("NCHW", (4, 3, 5, 6)), ("NHWC", (4, 5, 6, 3)), ("NC", (40, 3)), ("CM", (3, 40))],
)
@pytest.mark.parametrize("name", ["ceiling", *bench.found()[0]])
def test_contenders_agree_with_fastbn(hurried, name, layout, shape, operation):
    contender = {**peers.OURS, **peers.PEERS}[name]
    case = Case(operation, layout, shape, cases.CORES)
    if not contender.enters(case) or (operation == "layer" and layout != "NC"):
        return
    assert callable(bench.prepare(case, contender))  # it has compared the results


def test_another_result_is_an_error(hurried):
    class Wrong(peers.Numpy):
        def array(self, result):
            return super().array(result) + 1

    with pytest.raises(AssertionError, match="Wrong  has another result"):
        bench.prepare(Case("forward", "NC", (40, 3), 1), Wrong)


def test_the_command_tells_peers_first_and_ends_with_a_verdict(hurried, monkeypatch, capsys):
    class Broken(peers.Numpy):
        def prepare(self):
            raise RuntimeError("no such symbol")

    few = [[Case("forward", "NC", (40, 3), 1, family="one call")]]
    monkeypatch.setattr(bench, "short_cases", lambda threads: few)
    monkeypatch.setitem(peers.PEERS, "broken", Broken)
    monkeypatch.setattr(bench, "found", lambda: ({"numpy": "2", "broken": "1"}, ["torch"]))
    before = fastbn.get_num_threads()
    assert bench.run() == 0
    assert fastbn.get_num_threads() == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "peers found: numpy 2, broken 1; not installed: torch"
    assert lines[4].split() == " ".join(bench.header(["numpy", "broken"])).split()
    assert lines[5].startswith("forward")
    assert lines[5].endswith("x")
    assert lines[6] == "broken did not take part: no such symbol"
    assert lines[-1].startswith(("The machine was quiet: ", "Do not believe this table: "))


# bench/.


def test_cases_of_absent_peers_are_deselected_in_one_line(monkeypatch):
    pytest.importorskip("ml_dtypes")
    path = ROOT / "bench" / "conftest.py"
    spec = importlib.util.spec_from_file_location("bench_conftest", path)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    monkeypatch.setattr(bench, "found", lambda _peers: ({"numpy": "2"}, ["torch", "jax"]))
    config = SimpleNamespace(stash={}, getoption=lambda _name: False)
    config.stash[conftest.STATE] = state = conftest.State(config)
    gone = []
    config.hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))

    def item(name):
        entry = SimpleNamespace(contender=name, case=Case("forward", "NC", (4, 4), 1))
        return SimpleNamespace(callspec=SimpleNamespace(params={"entry": entry}))

    items = [item(name) for name in ("fastbn", "torch", "numpy", "torch", "jax")]
    conftest.pytest_collection_modifyitems(config, items)
    assert [conftest._contender(each) for each in items] == ["fastbn", "numpy"]
    assert [conftest._contender(each) for each in gone] == ["torch", "torch", "jax"]
    assert conftest.pytest_report_collectionfinish(config) == (
        "deselected 3 cases of absent peers: 2 of torch, 1 of jax"
    )
    assert conftest.pytest_report_header(config)[1].endswith("not installed: torch, jax")
    conftest.pytest_collection_finish(SimpleNamespace(config=config, items=items))
    assert [len(entries) for entries in state.entries.values()] == [2]


def a_file(path, rows, load=0.1):
    """Write what pytest-benchmark writes."""
    benchmarks = [
        {
            "extra_info": {"contender": name, "case": asdict(row.case)},
            "stats": {"median": t.median, "min": t.fastest, "max": t.slowest},
        }
        for row in rows
        for name, t in row.times.items()
    ]
    errors = {"torch": [[0.0, 1.5], [1e6, 2e4]], "fastbn": [[0.0, 0.5]]}
    for name, each in errors.items():
        info = {"contender": name, "case": asdict(ACCURACY), "errors": each}
        benchmarks.append({"extra_info": info, "stats": {}})
    machine = {
        "cpu": {"brand_raw": "A CPU"},
        "cores": 2,
        "load_before": load,
        "caches": "32K,1M,32M",
    }
    machine |= {"versions": {"fastbn": "1.0"}, "python_version": "3.12"}
    about = {"datetime": "2026-01-02T03:04", "commit_info": {"id": "0123456789abcdef"}}
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": machine, **about}))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("A\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nB\n")
    return tmp_path


def run_report(report, monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", "--root", str(folder), *map(str, arguments)])
    report.main()


def test_readme_and_pages_come_from_one_csv(report, monkeypatch, folder):
    run_report(report, monkeypatch, folder, a_file(folder / "results.json", a_run()))
    run_report(report, monkeypatch, folder, "--check")
    text = (folder / "README.md").read_text()
    assert text.startswith("A\n<!-- bench:begin -->")
    assert text.endswith("<!-- bench:end -->\nB\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 8
    assert table[0].endswith("| of ceiling | NumPy | PyTorch | oneDNN |")
    assert table[2].startswith("| forward | NCHW | sum of 32 norms | 320 ms |")
    assert (
        "float32 on 2 threads; A CPU, 2 CPUs, caches 32K,1M,32M (load 0.1 before); Python 3.12"
        in text
    )
    assert (
        "Case by case, fastbn loses to oneDNN in 1 of 1; at worst it takes 1.2 times as long "
        "(oneDNN: backward on NCHW (32, 64, 56, 56)). On arrays of 1 MB and more it is farthest"
    ) in text
    assert (folder / "docs" / "speed.png").exists()
    report.write_pages(folder / "docs")
    pages = folder / "docs" / "bench"
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert {each.name for each in pages.iterdir()} == {
        name for name in page.replace("(", " ").replace(")", " ").replace("bench/", " ").split()
        if name.endswith((".txt", ".png"))
    }  # fmt: skip
    assert "| NCHW | (4, 4) | 2 | 0.5 eps |" in (pages / "errors.txt").read_text()
    assert "| 256 squared | (256, 256) | fastbn | 1.00 |" in (pages / "blas.txt").read_text()

    readme = folder / "README.md"
    readme.write_text(text.replace("320 ms", "32 ms"))
    with pytest.raises(SystemExit, match=r"README\.md does not say"):
        run_report(report, monkeypatch, folder, "--check")


@pytest.mark.parametrize("what", ["load", "spread"])
def test_a_run_on_a_busy_machine_is_refused(report, monkeypatch, folder, what):
    rows = a_run()
    if what == "spread":
        rows[3].times["torch"] = Timing(1.0, 0.5, 2.0)
    results = a_file(folder / "results.json", rows, load=0.9 if what == "load" else 0.1)
    before = (folder / "README.md").read_text()
    with pytest.raises(SystemExit, match=r"refused:\n- .*(busy|differ by 4\.0 times)"):
        run_report(report, monkeypatch, folder, results)
    assert (folder / "README.md").read_text() == before
    assert not (folder / "docs" / "benchmarks.csv").exists()
    if what == "spread":  # the case alone is measured again
        again = a_file(folder / "again.json", a_run()[3:4])
        run_report(report, monkeypatch, folder, results, again)
        run_report(report, monkeypatch, folder, "--check")


def test_the_csv_keeps_all_of_a_run(report, folder):
    found = report.Report()
    assert report.add_run(found, a_file(folder / "results.json", a_run())) == (0.1, 2)
    again = report.from_csv(report.to_csv(found))
    assert again.machine == found.machine
    assert (
        again.errors
        == found.errors
        == {
            ("torch", ACCURACY): [(0.0, 1.5), (1e6, 2e4)],
            ("fastbn", ACCURACY): [(0.0, 0.5)],
        }
    )
    assert [row.case for row in again.rows] == [row.case for row in found.rows]
    for mine, theirs in zip(again.rows, found.rows, strict=True):
        for name, timing in theirs.times.items():
            np.testing.assert_allclose(mine.times[name], timing, rtol=1e-3)


def test_readme_says_what_the_csv_holds(report, monkeypatch):
    if not (ROOT / "docs" / "benchmarks.csv").exists():
        pytest.skip("no run has been reported yet")
    run_report(report, monkeypatch, ROOT, "--check")
