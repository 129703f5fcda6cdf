"""The report: CSV, JSON and pictures, looked at as far as a program can."""

import csv
import json
import math

import pytest
from tune_objectives import bowl, space, start, steps

from fastbn.demo import DemoError
from fastbn.tune import choice, log_uniform, report, search

pytest.importorskip("optuna")
pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")


def some(trials=30):
    def diverging(params):
        yield from ([math.inf] if params["lr"] > 0.5 else steps(params))

    tiers = [{"lr": space["lr"]}, {name: space[name] for name in ("momentum", "units", "kind")}]
    return search(diverging, tiers, trials=trials, start=start, progress=False)


@pytest.fixture(scope="module")
def result():
    return some()


def test_all_files(result, tmp_path):
    names = ["trials.csv", "best.json", "history.png", "parallel.png", "slices.png",
             "importances.png", "scales.png"]  # fmt: skip
    files = report.write(tmp_path, result, result.best, "loss")
    assert [file.name for file in files] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads(files[1].read_text(encoding="utf-8")) == result.best
    for file in files[2:]:
        pixels = image.imread(file)
        assert pixels.std() > 0.05
        edges = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
        assert all((edge == 1).all() for edge in edges), f"{file.name}: something is cut off"


def test_the_csv_has_every_trial(result):
    rows = list(csv.DictReader(report.table(result).splitlines()))
    assert len(rows) == 30
    for row, r in zip(rows, result.trials, strict=True):
        assert (int(row["number"]), int(row["round"]), row["state"]) == (r.number, r.round, r.state)
        assert float(row["value"]) == r.value
        assert float(row["params_momentum"]) == r.params["momentum"]
        assert (int(row["steps"]), row["worker"]) == (len(r.steps), r.worker)
        assert float(row["seconds"]) >= 0
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    assert {row["params_kind"] for row in rows} <= {"a", "b", "3"}


def test_a_small_budget(tmp_path):
    result = some(trials=2)
    assert result.boxes[0].keys() == {"lr"}
    files = report.write(tmp_path, result, result.best)
    assert "parallel.png" in {file.name for file in files}
    rows = list(csv.DictReader(report.table(result).splitlines()))
    assert {row["params_units"] for row in rows} == {"5"}  # held, and told


def test_pictures_without_what_they_need(tmp_path):
    flat = search(lambda _: -1.0, {"a": choice(1, 2)}, trials=4, progress=False)
    names = {file.stem for file in report.write(tmp_path, flat, flat.best)}
    assert names == {"trials", "best", "history", "parallel", "slices"}


def test_the_wasted_trials_of_a_linear_scale():
    where = {"lr": log_uniform(1e-4, 1)}
    found = search(lambda p: bowl({**start, **p}), where, trials=40, progress=False, rounds=1)
    figure = report.why_scales(found, "value")
    title = figure.axes[0].get_title()
    assert title.startswith("lr: the best 4 lie from 0.0")
    words = title.split("there fall")[1].split()
    assert (words[1:3], words[-4:]) == (["of", "40"], ["of", "a", "linear", "one"])
    ours, linear = int(words[0]), int(words[7])
    assert linear <= 1 < ours


def test_a_file_that_cannot_be_written(result, tmp_path):
    (tmp_path / "best.json").mkdir()
    with pytest.raises(DemoError, match=r"--out .*best.json: cannot be written"):
        report.write(tmp_path, result, result.best)
    assert {path.name for path in tmp_path.iterdir()} == {"trials.csv", "best.json"}
