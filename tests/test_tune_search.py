"""The search: rounds, tiers, samplers, pruning, workers that die, studies shared and resumed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from tune_objectives import Logged, bowl, killed, space, start, steps, wrong

import fastbn
from fastbn.demo import DemoError
from fastbn.tune import choice, log_uniform, rounds, search, uniform
from fastbn.tune.rounds import Plan, Round, Search, ranked
from fastbn.tune.search import opened

optuna = pytest.importorskip("optuna")
pytest.importorskip("cmaes")


def quiet(objective=bowl, where=space, **options):
    return search(objective, where, progress=False, **options)


def content(result):
    """Return what does not depend on who worked when."""
    return [(r.number, r.round, r.state, r.params, r.value) for r in result.trials]


@pytest.mark.parametrize("sampler", rounds.SAMPLERS)
def test_it_finds_the_bottom(sampler):
    result = quiet(sampler=sampler, trials=60)
    assert len(result.trials) == 60
    assert [r.number for r in result.trials] == list(range(60))
    assert {r.state for r in result.trials} == {"complete"}
    assert result.value == min(r.value for r in result.trials) == bowl(result.best)
    assert result.value < 0.02


def test_the_seed_decides():
    one, same, other = (quiet(seed=seed) for seed in (4, 4, 5))
    assert content(one) == content(same) != content(other)


def test_the_start_comes_first():
    first = quiet(start=start, trials=4).trials[0]
    assert first.params == start
    assert first.value == bowl(start)


def test_a_round_searches_around_the_best_few():
    result = quiet(trials=30, rounds=3)
    assert Counter(r.round for r in result.trials) == {1: 10, 2: 10, 3: 10}
    assert result.boxes[0] == space
    for number in (2, 3):
        before = [r for r in result.trials if r.round < number]
        box = result.boxes[number - 1]
        for r in ranked(before)[:3]:
            assert all(r.params[name] in box[name] for name in space)
        for r in result.trials:
            if r.round == number:
                assert all(r.params[name] in box[name] for name in space)
    widths = [space["lr"].position(b["lr"].high) - space["lr"].position(b["lr"].low)
              for b in result.boxes]  # fmt: skip
    assert widths[0] == 1
    assert min(widths[1:]) < 1


def test_rounds_are_split_evenly_and_by_default_in_two():
    assert Counter(r.round for r in quiet(trials=7, rounds=3).trials) == {1: 3, 2: 2, 3: 2}
    assert Counter(r.round for r in quiet(trials=7).trials) == {1: 4, 2: 3}
    assert {r.round for r in quiet(trials=7, sampler="tpe").trials} == {1}
    assert len(quiet(trials=1).trials) == 1


def test_a_round_carries_the_best_over():
    with opened(None) as storage:
        plan = Plan(steps, space, {}, {}, 40, 2, "random", True, 0, "study")
        process = Search(plan, storage)
        process.work("me")
        second = process.rounds[1]
        carried = [t for t in second.study.trials if "carried" in t.user_attrs]
        expected = ranked(process.rounds[0].records())[: len(carried)]
    assert len(carried) == 4
    assert [t.user_attrs["carried"] for t in carried] == [r.number for r in expected]
    assert [t.value for t in carried] == [r.value for r in expected]
    assert {t.state.name for t in carried} == {"COMPLETE"}


TIERS = [{"lr": space["lr"]}, {"momentum": space["momentum"], "units": space["units"]},
         {"kind": space["kind"]}]  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "held"),
    [(1, {"momentum", "units", "kind"}), (17, {"momentum", "units", "kind"}), (18, {"kind"}),
     (23, {"kind"}), (24, set())],
)  # fmt: skip
def test_a_small_budget_tunes_the_first_tiers(trials, held):
    for given in (None, start):
        result = quiet(where=TIERS, trials=trials, start=given)
        middle = {name: scale.at(0.5) for name, scale in space.items()}
        for r in result.trials:
            assert {name: r.params[name] for name in held} == {
                name: (given or middle)[name] for name in held
            }
        assert result.boxes[0].keys() == space.keys() - held
        assert result.best.keys() == space.keys()


def test_halving_stops_the_hopeless():
    result = quiet(steps, trials=40, rounds=1)
    lengths = Counter(len(r.steps) for r in result.trials)
    assert lengths.keys() == {2, 4, 8}  # a quarter, half, all
    assert {r.state for r in result.trials if len(r.steps) < 8} == {"pruned"}
    complete = [r for r in result.trials if len(r.steps) == 8]
    assert {r.state for r in complete} == {"complete"}
    assert 5 <= len(complete) <= 15
    assert all(r.value == r.steps[-1] for r in result.trials)
    assert result.value == pytest.approx(min(bowl(r.params) for r in complete) + 1 / 8)
    # what was stopped was worse than half of what was compared with it
    firsts = [r.steps[1] for r in result.trials]
    assert min(firsts) in [r.steps[1] for r in complete]


def test_without_pruning_all_trials_end():
    result = quiet(steps, trials=12, prune=False)
    assert {(r.state, len(r.steps)) for r in result.trials} == {("complete", 8)}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 20, 100])
def test_the_rungs_are_a_quarter_and_half(length):
    at = rounds.rungs(length)
    assert len(at) == (2 if length >= 4 else 0)
    assert all(0 < step <= length / 2 for step in at)


def test_infinity_and_nan_are_the_worst():
    def diverging(params):
        if params["lr"] > 0.1:
            return float("nan")
        return float("inf") if params["lr"] > 0.01 else 1.0

    result = quiet(diverging)
    assert result.best["lr"] <= 0.01
    assert {r.value for r in result.trials} == {1.0, float("inf")}
    with pytest.raises(DemoError, match="objective: expected a finite number, got none in 4"):
        quiet(lambda _: float("inf"), trials=4)


def test_a_generator_that_is_stopped_is_closed():
    closed = []

    def yielding(params):
        try:
            yield from steps(params)
        finally:
            closed.append(1)

    quiet(yielding, trials=12)
    assert len(closed) == 12


def test_importances_tell_what_matters():
    pytest.importorskip("sklearn")
    result = quiet(lambda p: abs(space["lr"].position(p["lr"]) - 0.5), trials=60, rounds=1)
    assert result.importances.keys() == space.keys()
    assert sum(result.importances.values()) == pytest.approx(1)
    assert result.importances["lr"] > 0.8
    assert quiet(lambda _: 1.0, trials=5).importances == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, DemoError, "trials: expected an integer from 1, got 0"),
        ({"trials": 2.0}, DemoError, "trials: expected an integer from 1, got 2.0"),
        ({"workers": 0}, DemoError, "workers: expected an integer from 1, got 0"),
        ({"seed": -1}, DemoError, "seed: expected an integer from 0, got -1"),
        ({"trials": 3, "rounds": 4}, DemoError, "rounds: expected an integer from 1 to 3 trials"),
        ({"rounds": 0}, DemoError, "rounds: expected an integer from 1 to 40 trials, got 0"),
        ({"sampler": "grid"}, DemoError, "sampler: expected random or tpe or cmaes, got 'grid'"),
        ({"objective": 5}, TypeError, "objective: expected a function, got 5"),
        ({"start": {"lr": 0.1}}, DemoError, "start: expected lr, momentum, units, kind, got lr"),
        ({"start": {**start, "lr": 2.0}}, DemoError, "start: lr: expected a value of Log.* got 2"),
        ({"start": {**start, "units": 2.0}}, DemoError, "start: units: expected a value of Int"),
        ({"objective": lambda _: "x"}, TypeError, "objective: expected a number, got 'x'"),
        ({"objective": lambda _: None}, TypeError, "objective: expected a number, got None"),
        ({"objective": lambda _: (yield from ())}, ValueError, "expected at least one yield"),
        ({"objective": lambda _: 1.0, "workers": 2}, DemoError, "expected a function of a module"),
        ({"storage": "grpc://here"}, DemoError, "storage: expected grpc://HOST:PORT, got grpc"),
        ({"storage": "nosuch://x"}, DemoError, "storage: nosuch://x: cannot be used: "),
        ({"storage": "sqlite:////no/such/folder/x.db"}, DemoError, "cannot be used: .*unable to"),
    ],
)
def test_errors(options, error, message):
    if "grpc" in options.get("storage", ""):
        pytest.importorskip("grpc")
    with pytest.raises(error, match=message):
        quiet(**options)


def test_optuna_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DemoError, match=r'pip install "fastbn\[tune\]"'):
        quiet()


def test_fastbn_alone_imports_none_of_it():
    code = (
        "import sys, fastbn; assert not {'optuna', 'fastbn.tune', 'fastbn.demo'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_of_the_objective_ends_the_search_and_loses_nothing(tmp_path):
    storage = str(tmp_path / "journal")
    calls = []

    def sometimes(params):
        calls.append(params)
        if len(calls) == 3:
            raise ArithmeticError("no value")
        return bowl(params)

    with pytest.raises(ArithmeticError, match="no value"):
        quiet(sometimes, trials=6, storage=storage)
    result = quiet(sometimes, trials=6, storage=storage)
    assert content(result) == content(quiet(trials=6))
    assert len(calls) == 7
    assert calls[2] == calls[3]  # the trial that failed came again
    assert [r.attempts for r in result.trials] == [1, 1, 2, 1, 1, 1]


def test_an_error_of_the_objective_in_a_worker():
    with pytest.raises(DemoError, match=r"objective: ArithmeticError: no value for \d") as caught:
        quiet(wrong, trials=6, workers=2)
    assert "tune_objectives.py" in caught.value.__notes__[0]


def test_a_study_resumes_and_knows_its_plan(tmp_path):
    storage = str(tmp_path / "journal")
    first = quiet(trials=8, storage=storage)
    called = Logged(str(tmp_path / "log"))
    assert content(quiet(trials=8, storage=storage)) == content(first)
    for options, message in [
        ({"trials": 9}, "trials: expected 8 as in the study 'study', got 9; another name makes"),
        ({"seed": 1}, "seed: expected 0 as in the study 'study', got 1"),
        ({"where": {"lr": uniform(0, 1)}}, "space: expected .* as in the study"),
        ({"objective": called}, "objective: expected .*bowl as in the study 'study', got Logged"),
    ]:
        with pytest.raises(DemoError, match=message):
            quiet(**{"trials": 8, "storage": storage, **options})
    assert not (tmp_path / "log").exists()
    assert len(quiet(trials=9, storage=storage, study="other").trials) == 9


# Workers that die, seen from within one process.


@pytest.fixture
def hasty(monkeypatch):
    """Let workers count as dead soon."""
    monkeypatch.setattr(rounds, "GRACE", 0.3)
    monkeypatch.setattr(rounds, "POLL", 0.02)


def new_round(storage, trials=3, objective=bowl):
    plan = Plan(objective, space, {}, {}, trials, 1, "random", True, 0, "study")
    return Round(plan, storage, None, [])


def tend_until(round_, happened):
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        round_.tend()
        time.sleep(0.02)


@pytest.mark.usefixtures("hasty")
def test_a_trial_without_a_sign_of_life_is_given_to_another():
    with opened(None) as storage:
        round_ = new_round(storage)
        dead = round_.claim("dead")
        params = {n: scale.suggest(dead, n) for n, scale in space.items()}
        tend_until(round_, lambda: round_.records()[0].state == "waiting")
        heirs = [round_.claim("heir") for _ in range(3)]
        assert round_.claim("heir") is None
        [heir] = [t for t in heirs if t.user_attrs["slot"] == 0]
        assert {n: scale.suggest(heir, n) for n, scale in space.items()} == params
        # one that counted as dead and was not: its result comes too late
        round_.run(dead, lambda: None)
        for each in heirs:
            round_.run(each, lambda: None)
        records = round_.records()
    assert [(r.state, r.worker, r.attempts) for r in records] == [
        ("complete", "heir", 2), ("complete", "heir", 1), ("complete", "heir", 1),
    ]  # fmt: skip


@pytest.mark.usefixtures("hasty")
def test_signs_of_life_keep_a_trial(monkeypatch):
    with opened(None) as storage:
        round_ = new_round(storage)
        trial = round_.claim("alive")
        for beat in range(40):
            storage.set_trial_user_attr(trial._trial_id, "beat", beat)
            round_.tend()
            time.sleep(0.02)
        assert round_.records()[0].state == "running"


def test_signs_of_life_are_given(monkeypatch):
    monkeypatch.setattr(rounds, "BEAT", 1)
    with opened(None) as storage:
        round_ = new_round(storage, objective=Logged(os.devnull, seconds=1.5))
        trial = round_.claim("alive")
        round_.run(trial, lambda: None)
        assert storage.get_trial(trial._trial_id).user_attrs["beat"] == 1


def test_a_process_that_slept_takes_nobody_for_dead(monkeypatch):
    monkeypatch.setattr(rounds, "GRACE", 60.0)
    clock = [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    with opened(None) as storage:
        round_ = new_round(storage)
        round_.claim("asleep as well")
        round_.tend()
        clock[0] = 3600.0
        round_.tend()
        assert round_.records()[0].state == "running"
        for _ in range(61):
            clock[0] += 1.0
            round_.tend()
        assert round_.records()[0].state == "waiting"


def test_a_trial_that_kills_its_workers_is_given_up():
    with opened(None) as storage:
        round_ = new_round(storage, trials=1)
        for attempt in range(1, 4):
            trial = round_.claim(f"worker {attempt}")
            assert not round_.release_all("another")
            assert round_.release_all(f"worker {attempt}", lost=True)
            round_.release(storage.get_trial(trial._trial_id), lost=True)  # known already
        assert round_.claim("one more") is None
        [record] = round_.records()
    assert (record.state, record.value, record.attempts) == ("failed", None, 3)
    assert record.finished


def test_a_slot_that_was_filled_twice_runs_once():
    with opened(None) as storage:
        round_ = new_round(storage)
        round_._fill(1)
        claimed = [round_.claim("me") for _ in range(3)]
        assert round_.claim("me") is None
        assert sorted(t.user_attrs["slot"] for t in claimed) == [0, 1, 2]


@pytest.mark.usefixtures("hasty")
def test_slots_that_were_not_filled_are_filled(monkeypatch):
    with opened(None) as storage:
        with monkeypatch.context() as patch:
            patch.setattr(Round, "_fill", lambda *_: None)  # as if it died of it
            new_round(storage)
        round_ = new_round(storage)
        tend_until(round_, lambda: round_.claim("me"))
        tend_until(round_, lambda: round_.claim("me"))
        tend_until(round_, lambda: round_.claim("me"))
        assert [r.state for r in round_.records()] == ["running"] * 3


# Processes.


def begun(path):
    """Return the lines of a log: pid, threads, threads of BLAS, lr."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_workers_share_the_threads_and_draw_what_one_would(tmp_path):
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(5)
    variables = dict(os.environ)
    try:
        result = quiet(Logged(str(tmp_path / "log"), 0.1), trials=14, workers=2)
    finally:
        fastbn.set_num_threads(before)
    assert dict(os.environ) == variables
    assert content(result) == content(quiet(trials=14))
    lines = begun(tmp_path / "log")
    assert len(lines) == len({line[3] for line in lines}) == 14
    assert len({line[0] for line in lines}) == len({r.worker for r in result.trials}) == 2
    assert {tuple(line[1:3]) for line in lines} == {("2", "2")}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_worker_costs_time_only(tmp_path):
    log = tmp_path / "log"
    victims = []

    def kill():
        while len(begun(log)) < 5:
            time.sleep(0.02)
        victims.append(begun(log)[-1])
        os.kill(int(victims[0][0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = quiet(Logged(str(log), 0.3), trials=12, workers=2, storage=str(tmp_path / "journal"))
    killer.join()
    assert content(result) == content(quiet(trials=12))
    times = Counter(line[3] for line in begun(log))
    [[_, _, _, lr]] = victims
    assert times.pop(lr) == 2
    assert set(times.values()) == {1}
    assert len(times) == 11
    assert sorted(r.attempts for r in result.trials) == [1] * 11 + [2]
    assert len({line[0] for line in begun(log)}) == 3  # it was replaced


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_all_workers_die_of_one_trial():
    result = quiet(killed, start=start, trials=2, rounds=1, workers=2)
    assert {r.state for r in result.trials if r.params.get("units") != 5} == {"complete"}
    lost = [r for r in result.trials if r.params.get("units") == 5]
    assert lost
    assert {(r.state, r.attempts, r.value) for r in lost} == {("failed", 3, None)}


# Several commands on one storage.

COMMAND = """
import sys
from tune_objectives import Logged, space
from fastbn.tune import search
log, storage = sys.argv[1:]
result = search(Logged(log, 0.05), space, trials=16, storage=storage, progress=False)
print(*(r.value for r in result.trials))
"""


@contextmanager
def journal(folder):
    yield str(folder / "journal")


@contextmanager
def sqlite(folder):
    yield f"sqlite:///{folder / 'study.db'}"


@contextmanager
def grpc(folder):
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server  # run_grpc_proxy_server never ends

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = make_server(optuna.storages.InMemoryStorage(), "localhost", port)
    server.start()
    try:
        yield f"grpc://localhost:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def postgresql(folder):
    pytest.importorskip("psycopg")
    on_debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    path = os.pathsep.join([os.environ["PATH"], *map(str, reversed(on_debian))])
    initdb, server = (shutil.which(name, path=path) for name in ("initdb", "postgres"))
    if not initdb or not server:
        pytest.skip("there is no PostgreSQL server (Debian: apt-get install postgresql)")
    user = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to run as root
    # Not in pytest's folder: the name of a socket is short, and another user has to get there.
    with tempfile.TemporaryDirectory(prefix="fastbn") as name:
        if user:
            shutil.chown(name, "nobody")
        quiet = {"stdout": subprocess.DEVNULL, "cwd": name, **user}
        data = str(Path(name, "data"))
        subprocess.run([initdb, "-D", data, "-U", "tune", "-A", "trust", "--no-sync"],
                       check=True, stderr=subprocess.DEVNULL, **quiet)  # fmt: skip
        options = ["-D", data, "-k", name, "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen([server, *options], stderr=subprocess.PIPE, text=True, **quiet)
        with process:
            try:
                for line in process.stderr:
                    if "ready to accept connections" in line:
                        break
                else:
                    pytest.fail("the PostgreSQL server did not start")
                threading.Thread(target=process.stderr.read).start()  # lest it waits for a reader
                yield f"postgresql://tune@/postgres?host={name}"
            finally:
                process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("storage", [journal, sqlite, grpc, postgresql])
def test_two_commands_share_a_study(storage, tmp_path):
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with storage(tmp_path) as url:
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, log, url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for _ in range(2)
        ]
        told = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    expected = [r.value for r in quiet(trials=16).trials]
    assert [[float(word) for word in out.split()] for out, _ in told] == [expected] * 2
    lines = begun(log)
    assert len(lines) == len({line[3] for line in lines}) == 16
    assert len({line[0] for line in lines}) == 2


# What is shown.


def test_a_line_for_each_trial(capsys):
    search(bowl, space, trials=12)
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 12
    for count, text in enumerate(lines, 1):
        assert text.startswith(f"{count:2}/12  trial {count - 1}  round {1 + (count > 6)}  compl")
    assert re.search(r"  0\.\d+  lr=\S+ momentum=0\.9\d+ units=\d kind=[ab3]$", lines[0])


def test_a_live_table_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    search(steps, space, trials=12)
    out = capsys.readouterr().out
    assert "12 of 12 trials" in out
    assert re.search(r"\d+ of 12 trials, about 0 min \d+ s left", out)
    for word in ("best", "momentum", "running", "pruned"):
        assert word in out
    assert "1/12  trial" not in out


def test_choice_alone_and_log_alone():
    assert quiet(lambda p: p["x"], where={"x": choice(3, 1, 2)}, trials=12).best == {"x": 1}
    assert quiet(lambda p: p["x"], where={"x": log_uniform(1, 10)}, trials=12).value < 3
