"""``fastbn tune``: the network of the demo, functions of one's own, errors, Ctrl-C."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import command, run

from fastbn.demo import DemoError
from fastbn.demo.config import CHOICES, OPTIMIZER, Config, configure, option
from fastbn.tune import network

for module in ("optuna", "cmaes", "rich", "sklearn", "matplotlib", "tqdm", "threadpoolctl"):
    pytest.importorskip(module)

OWN = """
import math, time
from fastbn.tune import integer, log_uniform

space = [{"lr": log_uniform(1e-4, 1)}, {"units": integer(1, 9)}]
start = {"lr": 0.1, "units": 3}

def objective(params):
    return abs(math.log10(params["lr"]) + 2) + params["units"] / 100

def slow(params):
    with open("log", "a") as file:
        print(params["lr"], file=file)
    time.sleep(0.4)
    return objective(params)

no_function = 5

def missing(params):
    with open("weights.npz") as file:
        return len(file.read())

def exits(params):
    raise SystemExit("no GPU")

def unspeakable(params):
    class Unspeakable(Exception):
        def __str__(self):
            raise RuntimeError
    raise Unspeakable

def elsewhere(params):
    import os
    os.makedirs("work", exist_ok=True)
    os.chdir("work")
    return objective(params)

def constant(params):
    return 1.0
"""


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    """Return options to tune a small network, on data that are easy to learn."""
    rng = np.random.default_rng(3)
    y = np.arange(140) % 3
    x = rng.standard_normal((3, 4, 4))[y] + 0.3 * rng.standard_normal((140, 4, 4))
    np.savez(tmp_path / "blobs.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "REPEATS", 2)
    return ["tune", "--data", "blobs.npz", "--epochs", "4", "--hidden", "8,8"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield ["tune", "mine:objective"]
    sys.modules.pop("mine", None)


def test_the_demo_network(blobs, tmp_path, capsys):
    status, out, err = run([*blobs, "--trials", "24", "--seed", "3"], capsys)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "tuned, most important first: lr; momentum, batch_size; decay_rate"
    assert sum(" trial " in line for line in lines[1:25]) == 24
    assert re.fullmatch(r"24 trials: \d+ complete, \d+ stopped early, 0 failed", lines[25])
    for text in ("  1. lr 0.", "  2. momentum 0.", "  3. decay_rate 0."):
        assert f"\n{text}" in out
    with (tmp_path / "tune" / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert float(rows[0]["params_lr"]) == configure({"optimizer": "momentum"}).lr
    best = json.loads((tmp_path / "tune" / "best.json").read_text(encoding="utf-8"))
    assert best["hidden"] == [8, 8]
    assert best["seed"] == 3
    chosen = re.search(r"\n  the chosen   (\d\.\d{4}) \((\d\.\d{4}) to (\d\.\d{4})\)\n", out)
    default = re.search(r"\n  the default  (\d\.\d{4}) \(", out)
    assert float(chosen[1]) >= float(default[1]) - 0.05

    # the result can be trained as it is, and its accuracy is one of those told
    [line] = [line for line in lines if line.startswith("train it: ")]
    words = shlex.split(line.removeprefix("train it: "))
    assert words[1:4] == ["-m", "fastbn", "train"]
    status, out, err = run(words[3:], capsys)
    assert (status, err) == (0, "")
    assert float(chosen[2]) <= float(out.split()[-1]) <= float(chosen[3])


def test_a_finished_study_is_told_again(blobs, tmp_path, capsys):
    first = run([*blobs, "--trials", "3"], capsys)
    assert run([*blobs, "--trials", "3"], capsys) == first
    status, _, err = run([*blobs, "--trials", "4"], capsys)
    assert status == 2
    assert err.startswith("fastbn tune: error: trials: expected 3 as in the study 'study', got 4;")


def test_the_test_examples_decide_nothing(blobs, tmp_path, capsys):
    run([*blobs, "--trials", "4"], capsys)
    first = (tmp_path / "tune" / "best.json").read_text(encoding="utf-8")
    with np.load(tmp_path / "blobs.npz") as file:
        x, y = file["x"], file["y"]
    test = np.random.default_rng(0).permutation(140)[:28]  # as demo.data splits them
    x[test] = 0
    np.savez(tmp_path / "blobs.npz", x=x, y=y)
    network._data.cache_clear()
    run([*blobs, "--trials", "4", "--out", "again"], capsys)
    assert (tmp_path / "again" / "best.json").read_text(encoding="utf-8") == first
    network._data.cache_clear()


@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
@pytest.mark.parametrize("decay", CHOICES["lr_decay"])
@pytest.mark.parametrize("model", CHOICES["model"])
def test_the_space(model, decay, optimizer):
    given = {"model": model, "lr_decay": decay, "optimizer": optimizer}
    also = [n for n in ("beta1", "beta2", "eps") if n in OPTIMIZER.get(optimizer, {})]
    tiers = network.space_of(given, also)
    names = [name for tier in tiers for name in tier]
    has_rate = decay not in ("none", "cosine")
    assert [set(tier) for tier in tiers] == [
        tier
        for tier in (
            {"lr"},
            {"units", "batch_size", *({"momentum"} if optimizer == "momentum" else ())},
            {"layers", *({"decay_rate"} if has_rate else ())},
            set(also),
        )
        if tier
    ]
    start = network.start_of(given, names)
    for tier in tiers:
        for name, scale in tier.items():
            assert start[name] in scale
            for end in (0, 1):  # every corner is a configuration
                network.config_of(given, {**start, name: scale.at(end)})
    assert network.config_of(given, start) == configure(given)


def test_what_is_given_is_not_tuned():
    given = {"optimizer": "momentum", "lr": 0.1, "hidden": (8,), "batch_size": 16, "momentum": 0.5}
    assert [set(tier) for tier in network.space_of(given, ())] == [{"decay_rate"}]
    with pytest.raises(DemoError, match="nothing is left to tune"):
        network.space_of({**given, "decay_rate": 0.5}, ())
    with pytest.raises(DemoError, match="--also: expected nothing with --optimizer momentum, got"):
        network.space_of(given, ["beta1"])
    with pytest.raises(DemoError, match="--also: expected beta1, eps with --optimizer adam, got x"):
        network.space_of({"optimizer": "adam", "beta2": 0.9}, ["beta1", "x"])


GIVEN = {
    "data": "blobs.npz", "data_dir": "elsewhere", "model": "resnet", "norm": "none",
    "zero_gamma": None, "hidden": "8,8", "optimizer": "sgd", "lr": "0.1", "momentum": "0.5",
    "beta1": "0.8", "beta2": "0.98", "eps": "1e-7", "lr_decay": "cosine", "decay_rate": "0.8",
    "batch_size": "20", "epochs": "1", "seed": "7",
}  # fmt: skip
NEEDS = {
    "zero_gamma": ["--model", "resnet"],
    **{name: ["--optimizer", "adam"] for name in ("beta1", "beta2", "eps")},
}


# A search is not one training over several processes.
@pytest.mark.parametrize("name", sorted(Config.__dataclass_fields__.keys() - {"local_norm"}))
def test_an_option_given_by_hand_is_checked_against_what_will_run(name, blobs, capsys, monkeypatch):
    ran = {}

    def search(function, tiers, **options):
        ran.update(configs=[network.config_of(function.given, options["start"])], tiers=tiers)
        raise DemoError("that is enough")

    monkeypatch.setattr("fastbn.tune.command.search", search)
    words = [option(name), *([] if GIVEN[name] is None else [GIVEN[name]])]
    data = [] if name == "data" else ["--data", "blobs.npz"]
    status, _, err = run(["tune", *data, *NEEDS.get(name, []), *words], capsys)
    assert (status, err) == (2, "fastbn tune: error: that is enough\n")
    [config] = ran["configs"]
    got = getattr(config, name)
    expected = {"data": str(Path("blobs.npz").absolute()), "zero_gamma": True, "hidden": (8, 8),
                "data_dir": str(Path("elsewhere").absolute())}  # fmt: skip
    assert got == expected.get(name, type(got)(GIVEN[name] or 0))
    assert not any(name in tier for tier in ran["tiers"])


def test_momentum_by_hand(blobs, tmp_path, capsys):
    words = [*blobs, "--trials", "3", "--epochs", "1", "--momentum", "0.8"]
    status, out, err = run(words, capsys)
    assert (status, err) == (0, "")
    assert out.startswith("tuned, most important first: lr\n")
    assert "importance: cannot be told from these trials\n" in out
    best = json.loads((tmp_path / "tune" / "best.json").read_text(encoding="utf-8"))
    assert (best["optimizer"], best["momentum"]) == ("momentum", 0.8)


def test_few_examples(blobs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for examples, tuned in ((40, "batch_size"), (20, "decay_rate")):
        np.savez(tmp_path / "blobs.npz", x=rng.random((examples, 4, 4)), y=np.arange(examples) % 2)
        network._data.cache_clear()
        words = [*blobs, "--trials", "40", "--epochs", "1", "--out", tuned, "--lr", "0.1"]
        status, out, err = run([*words, "--momentum", "0.5", "--sampler", "odd"], capsys)
        if tuned == "batch_size":
            assert (
                err == "fastbn tune: error: sampler: expected random or tpe or cmaes, got 'odd'\n"
            )
            assert out == "tuned, most important first: batch_size; decay_rate\n"
        else:
            assert err.startswith("fastbn tune: error: --batch-size: expected at most ")
        assert status == 2
    network._data.cache_clear()


def test_a_network_that_diverges(blobs):
    loss = network.ValidationLoss({"data": "blobs.npz", "norm": "none", "optimizer": "sgd"})
    assert list(loss({"lr": 1e30})) == [np.inf]
    config = network.config_of(loss.given, {"lr": 1e30})
    assert network.test_accuracies(config) == [0.0, 0.0]


def test_adam_and_what_is_asked_for(blobs, capsys):
    options = ["--optimizer", "adam", "--also", "beta2,eps", "--lr-decay", "none", "--epochs", "1"]
    status, out, _ = run([*blobs, *options, "--trials", "12"], capsys)
    assert status == 0
    assert out.startswith(
        "tuned, most important first: lr; batch_size\nheld, as 12 trials are few: beta2, eps\n"
    )
    status, out, _ = run([*blobs, *options, "--trials", "24", "--out", "more"], capsys)
    assert status == 0
    assert out.startswith("tuned, most important first: lr; batch_size; beta2, eps\n 1/24")
    assert len({line.split("beta2=")[1] for line in out.splitlines() if "/24" in line}) == 24


@pytest.mark.parametrize(
    "options", ["", "--workers 2", "--sampler tpe", "--storage sqlite:///study.db --rounds 3"]
)
def test_a_function_of_ones_own(options, own, tmp_path, capsys):
    status, out, err = run([*own, "--trials", "20", *options.split()], capsys)
    assert (status, err) == (0, "")
    best = json.loads((tmp_path / "tune" / "best.json").read_text(encoding="utf-8"))
    assert best.keys() == {"lr", "units"}
    assert 0.001 < best["lr"] < 0.1
    assert out.splitlines()[-1] == (
        "written to tune: trials.csv, best.json, history.png, parallel.png, slices.png,"
        " importances.png, scales.png"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mine", "MODULE:FUNCTION: expected a module and a function, got 'mine'"),
        ("nothing:objective", "MODULE:FUNCTION: No module named 'nothing'"),
        ("mine:other", "MODULE:FUNCTION: mine has no 'other'"),
        ("mine:no_function", "MODULE:FUNCTION: expected a function, got 5"),
        ("bare:objective", "MODULE:FUNCTION: bare has no 'space'"),
        ("odd:objective", "MODULE:FUNCTION: odd: space: expected a dict or a list of them, got"),
        ("mine:objective --lr 0.1", "--lr: cannot be used with MODULE:FUNCTION"),
        ("mine:objective --also eps", "--also: cannot be used with MODULE:FUNCTION"),
        ("mine:objective --trials 0", "trials: expected an integer from 1, got 0"),
        ("mine:objective --trials x", "argument --trials: invalid int value: 'x'"),
        ("mine:objective --sampler grid", "sampler: expected random or tpe or cmaes, got 'grid'"),
        ("mine:objective --storage x://y", "storage: x://y: cannot be used: "),
        ("mine:objective --out mine.py", "--out mine.py: "),
        ("mine:objective --storage sqlite://", "storage: expected a file or sqlite:///FILE, got"),
        ("mine:objective --storage :memory:", "workers cannot share a database in memory"),
        ("mine:objective --storage /dev/null", "storage: /dev/null: cannot be used: "),
        ("mine:objective --storage=", "storage: expected a name, got ''"),
        ("mine:objective --storage mine.py", "mine.py: cannot be used: "),
        ("mine:objective --study=", "study: expected a name, got ''"),
        ("mine:objective --rounds 0", "rounds: expected an integer from 1 to 40 trials, got 0"),
        ("mine:objective --workers 0", "workers: expected an integer from 1, got 0"),
        ("mine:objective --seed -1", "seed: expected an integer from 0, got -1"),
        ("--optimizer adam --momentum 0.9", "--momentum: expected nothing with --optimizer adam"),
        ("--beta1 0.9", "--beta1: expected nothing with --optimizer momentum, got 0.9"),
        ("--lr-decay cosine --decay-rate 0.5", "--decay-rate: expected nothing with --lr-decay"),
        ("--also=", "--also: expected nothing with --optimizer momentum, got "),
        ("--also beta1", "--also: expected nothing with --optimizer momentum, got beta1"),
        ("--data none.npz", "none.npz: no such file"),
        ("--batch-size 1", "--batch-size: expected an integer from 2, got 1"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_errors_are_one_line(options, message, own, tmp_path, capsys):
    (tmp_path / "bare.py").write_text("objective = print", encoding="utf-8")
    (tmp_path / "odd.py").write_text("objective, space = print, 5", encoding="utf-8")
    status, _, err = run(["tune", *options.split()], capsys)
    assert status == 2
    assert re.fullmatch(r"fastbn(?: tune)?: error: .*\n", err)
    assert message in err
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == OWN
    for name in ("bare", "odd"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "FileNotFoundError: [Errno 2] No such file or directory: 'weights.npz'"),
        ("unspeakable", "Unspeakable: <exception str() failed>"),
    ],
)
def test_an_error_of_the_objective_comes_with_its_traceback(name, message, workers, own, capsys):
    words = ["tune", f"mine:{name}", "--trials", "4", "--workers", str(workers)]
    status, _, err = run(words, capsys)
    assert status == 2
    lines = err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert re.search(rf'mine.py", line \d+, in {name}$', lines[1])  # of the user's code alone
    assert lines[-2].startswith("raised by the objective with {'")
    assert lines[-1] == f"fastbn tune: error: objective: {message}"


def test_an_objective_that_exits(own, capsys):
    status, _, err = run(["tune", "mine:exits", "--trials", "4"], capsys)
    assert (status, err.splitlines()[-1]) == (
        2,
        "fastbn tune: error: objective: SystemExit: no GPU",
    )


@pytest.mark.parametrize("storage", ["", "--storage mine.journal", "--storage sqlite:///study.db"])
def test_an_objective_that_goes_elsewhere(storage, own, tmp_path, capsys):
    words = ["tune", "mine:elsewhere", "--trials", "4", *storage.split()]
    status, _, err = run(words, capsys)
    assert (status, err) == (0, "")
    assert (tmp_path / "tune" / "best.json").exists()
    os.chdir(tmp_path)
    first = (tmp_path / "tune" / "trials.csv").read_text(encoding="utf-8")
    assert run(words, capsys)[0] == 0  # from what was kept
    assert (tmp_path / "tune" / "trials.csv").read_text(encoding="utf-8") == first
    assert not [path for path in tmp_path.glob("work/*") if path.name != "work"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("open('weights.npz')", "FileNotFoundError: [Errno 2] No such file"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
)
def test_an_error_of_the_module_comes_with_its_traceback(text, error, own, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(text + "\n", encoding="utf-8")
    status, out, err = run(["tune", "broken:objective"], capsys)
    assert (status, out) == (2, "")
    *trace, last = err.splitlines()
    assert last.startswith(f"fastbn tune: error: MODULE:FUNCTION: broken: {error}")
    assert any('broken.py", line 1' in line for line in trace)
    assert not any("fastbn" in line or "importlib" in line for line in trace)
    assert not (tmp_path / "tune").exists()


def test_importances_that_cannot_be_told(own, tmp_path, capsys):
    status, out, err = run(["tune", "mine:constant", "--trials", "20"], capsys)
    assert (status, err) == (0, "")
    assert "\nimportance: cannot be told from these trials\n" in out
    names = {path.stem for path in (tmp_path / "tune").iterdir()}
    assert names >= {"trials", "best", "history", "parallel", "slices", "scales"}
    assert "importances" not in names


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_what_ended_the_workers_is_told(own, tmp_path, capsys):
    (tmp_path / "crashing.py").write_text(
        "import os, signal\n"
        "from fastbn.tune import choice\n"
        "space = {'x': choice(1, 2)}\n"
        "start = {'x': 2}\n"
        "def objective(params):\n"
        "    if params['x'] == 2:\n"
        "        signal.raise_signal(signal.SIGSEGV)\n"
        "    return 1.0\n",
        encoding="utf-8",
    )
    words = ["tune", "crashing:objective", "--trials", "4", "--rounds", "1", "--workers", "2"]
    status, out, _ = run(words, capsys)
    assert status == 0
    assert re.search(r" failed, SIGSEGV  x=2\n", out)
    assert re.search(r"4 trials: \d complete, 0 stopped early, \d failed \(SIGSEGV\)\n", out)
    sys.modules.pop("crashing", None)


def test_help(capsys):
    status, out, _ = run(["tune", "--help"], capsys)
    assert status == 0
    for word in ("--trials", "--rounds", "--sampler", "--also", "--workers", "--storage",
                   "--study", "--out", "--optimizer", "--lr", "--data", "--seed"):  # fmt: skip
        assert f"  {word}" in out
    assert "default: momentum" in out


@pytest.mark.parametrize("module", ["optuna", "rich"])
def test_a_missing_extra(module, own, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    status, _, err = run(own, capsys)
    assert status == 2
    assert err.endswith('pip install "fastbn[tune]"\n')


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_real_ctrl_c(workers, own, tmp_path):
    words = ["tune", "mine:slow", "--trials", 8, "--workers", workers]
    start = command(*words)
    process = subprocess.Popen(
        **start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        for _ in range(3):  # what is tuned, what is held, a trial
            assert process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it, to all of them
        _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[0] == ""
    assert err.splitlines()[1] == "interrupted: the finished trials are kept; resume with"
    again = shlex.split(err.splitlines()[2])
    assert again[1:] == ["-m", "fastbn", *map(str, words)]
    before = len((tmp_path / "log").read_text(encoding="utf-8").splitlines())
    assert 1 <= before < 8

    finished = subprocess.run(
        again, check=True, capture_output=True, text=True, env=start["env"]
    ).stdout
    assert "8 trials: " in finished
    with (tmp_path / "tune" / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete"] * 8
    begun = (tmp_path / "log").read_text(encoding="utf-8").split()
    assert set(begun) == {row["params_lr"] for row in rows}
    assert len(begun) <= 8 + workers  # only what was running began again
