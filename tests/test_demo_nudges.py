"""Nudges: sent by any number of processes, taken or refused once."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path

import pytest
from demo_cases import assert_same_bits
from demo_runs import column, config_for, disturb, log_of, plain, stop_after_3
from support import write_blobs

from fastbn import checkpoint
from fastbn.demo import DemoError, log, watch
from fastbn.demo.log import Log, Nudge
from fastbn.demo.watch import replay, resume, send, start

UNLINK = Path.unlink


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Save the time of the pictures, which have tests of their own."""
    monkeypatch.setattr(watch, "draw", lambda *_, **__: None)


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def stopped(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after_3(folder, patch)
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected --lr, --momentum, --rollback or --stop, got none of them"),
        ({"lr": 0.0}, "--lr: expected a positive number, got 0.0"),
        ({"lr": float("inf")}, "--lr: expected a positive number, got inf"),
        ({"lr": float("nan")}, "--lr: expected a positive number, got nan"),
        ({"lr": "0.1"}, "--lr: expected a positive number, got '0.1'"),
        ({"momentum": 1.0}, "--momentum: expected a number from 0 to below 1, got 1.0"),
        ({"momentum": -0.5}, "--momentum: expected a number from 0 to below 1, got -0.5"),
        ({"rollback": -1}, "--rollback: expected an epoch, or 0 for the start, got -1"),
        ({"rollback": True}, "--rollback: expected an epoch, or 0 for the start, got True"),
        ({"stop": 1}, "--stop: expected True or False, got 1"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(DemoError) as caught:
        Nudge(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"momentum": 0.5},
            "--momentum: expected a run with --optimizer momentum or adam, got sgd",
        ),
        ({"rollback": 4}, "--rollback: expected an epoch that is kept, 0, 1, 2, 3, got 4"),
        ({"rollback": 4, "lr": 0.1}, "--rollback: expected an epoch that is kept"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(values, message, stopped):
    with pytest.raises(DemoError, match=message):
        send(stopped, Nudge(**values))
    assert not (stopped / "nudges.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a nudge, or damaged"),
        (b"\xff\xfe", "not a nudge, or damaged"),
        (b"[" * 100_000, "not a nudge, or damaged"),
        (b"[1]", "not a nudge, or damaged"),
        (b'{"lr": 0.1, "colour": "red"}', "not a nudge, or damaged"),
        (b'{"lr": -1.0}', "--lr: expected a positive number, got -1.0"),
        (b'{"lr": 1}', "--lr: expected a positive number, got 1"),
        (b'{"rollback": 5}', "--rollback: expected an epoch that is kept, 0, 1, 2, 3, got 5"),
        (b'{"momentum": 0.5}', "--momentum: expected a run with"),
    ],
)
def test_what_only_the_run_can_tell_is_refused_there(content, message, stopped, capsys):
    (stopped / "nudges.jsonl").write_bytes(content + b"\n")
    (stopped / ".nudges.jsonl.1.2.tmp").write_bytes(b"not complete")
    trainer = resume(stopped, {})
    refused = [event for event in log_of(stopped).events if event["event"] == "refused"]
    assert [event["epoch"] for event in refused] == [4]
    assert message in refused[0]["why"]
    assert f"nudge before epoch 4 refused: {refused[0]['why']}\n" in capsys.readouterr().out
    assert log_of(stopped).answered == 1
    assert (stopped / "nudges.jsonl").read_bytes() == content + b"\n"
    assert (stopped / ".nudges.jsonl.1.2.tmp").exists()  # may be that of a process that sends
    assert_same_bits(trainer, plain(stopped, optimizer="sgd"))


def test_a_nudge_waits_for_a_run_that_was_killed(stopped):
    assert send(stopped, Nudge(lr=0.1)) is False
    assert send(stopped, Nudge(rollback=1)) is False
    assert send(stopped, Nudge(lr=0.2)) is False
    resume(stopped, {})
    assert [str(nudge) for _, nudge, _ in log_of(stopped).marks] == [
        "lr 0.1",
        "rollback to 1",
        "lr 0.2",
    ]
    assert column(stopped, "lr") == [0.3] * 3 + [0.2] * 5


def test_nudges_after_the_file_of_nudges_was_lost(stopped):
    for lr in (0.1, 0.2):
        send(stopped, Nudge(lr=lr))
    send(stopped, Nudge(stop=True))
    resume(stopped, {})
    (stopped / "nudges.jsonl").unlink()
    log_of(stopped).add("resume", epochs=6)
    send(stopped, Nudge(lr=0.3))
    resume(stopped, {})
    assert column(stopped, "lr") == [0.3] * 6
    assert [nudge.lr for _, nudge, _ in log_of(stopped).marks] == [0.1, 0.2, None, 0.3]


def test_a_run_that_ends_while_a_nudge_is_sent(stopped):
    with ThreadPoolExecutor() as pool:
        with watch._locked(stopped / "nudges.lock"):
            sending = pool.submit(send, stopped, Nudge(lr=0.1))
            log_of(stopped).add("end")
        with pytest.raises(DemoError, match="the run has ended after epoch 3"):
            sending.result()
    assert not (stopped / "nudges.jsonl").exists()


def test_a_nudge_that_is_taken_just_before_the_end(stopped, monkeypatch):
    write_text, training = watch.write_text, []

    def meanwhile(path, text):
        if path.name == "nudges.jsonl":
            training.append(pool.submit(resume, stopped, {}))
            while len(log_of(stopped).events) == 3:  # until it is there, and waits for the lock
                pass
        write_text(path, text)

    monkeypatch.setattr(watch, "write_text", meanwhile)
    with ThreadPoolExecutor() as pool:
        assert send(stopped, Nudge(lr=0.1)) is False
        training[0].result()
    assert log_of(stopped).ended
    assert len(log_of(stopped).marks) == 1


def test_a_nudge_between_the_last_look_and_the_end_is_answered(stopped, monkeypatch, capsys):
    add = Log.add

    def late(self, event, **fields):
        if event == "end":
            (stopped / "nudges.jsonl").write_text('{"rollback": 1}\n', encoding="utf-8")
        add(self, event, **fields)

    monkeypatch.setattr(Log, "add", late)
    resume(stopped, {})
    assert (
        "nudge before epoch 7 refused: the run has ended after epoch 6" in capsys.readouterr().out
    )
    assert log_of(stopped).answered == 1


class KilledError(BaseException):
    """The death of a process."""


def train_and_die(folder, run, moment, nudges, monkeypatch):
    """Train, and die before or after a write or a deletion; return whether it came to that."""
    moments, sending = count(), []

    def fatal(work):
        def step(path, *args, **options):
            lives = sending or (work is UNLINK and not path.name.startswith("epoch-"))
            if not lives and next(moments) == moment:
                raise KilledError
            work(path, *args, **options)
            if not lives and next(moments) == moment:
                raise KilledError

        return step

    def send_alive(*args):  # who sends does not die
        sending.append(True)
        send(*args)
        sending.pop()

    with monkeypatch.context() as patch:
        patch.setattr(watch, "send", send_alive)
        disturb(patch, run, nudges)
        for module in (checkpoint, log):
            patch.setattr(module, "write_atomically", fatal(module.write_atomically))
        patch.setattr(Path, "unlink", fatal(UNLINK))
        try:
            start(run, config_for(folder, epochs=3))
        except KilledError:
            return True
    return False


def test_a_death_at_any_moment_loses_nothing(folder, monkeypatch):
    nudges = {1: [{"lr": 0.1, "momentum": 0.5}, {"momentum": 0.6}], 2: [{"rollback": 1}]}
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine does not die
    for moment in count():
        run = folder.with_name(f"run{moment}")
        if not train_and_die(folder, run, moment, nudges, monkeypatch):
            break
        if not (run / "log.jsonl").exists():
            trainer, sent = start(run, config_for(folder, epochs=3)), []
        else:
            path = run / "nudges.jsonl"
            sent = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            trainer = resume(run, {})
        # Each nudge is answered once.
        answered = [event["nudge"] for event in log_of(run).events if "nudge" in event]
        assert answered == [json.loads(line) for line in sent]
        assert len(trainer.history) == 3
        assert_same_bits(replay(run), trainer)
    assert moment >= 36
    assert len(log_of(run).marks) == 3


def test_two_processes_nudge_at_once(folder):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastbn.demo.watch import Nudge, send\n"
        "for n in range(40):\n"
        "    assert send(Path(sys.argv[1]), Nudge(lr=float(sys.argv[2]) + n))\n"
    )
    argv = ["watch", folder, "--data", folder.parent / "blobs.npz"]
    argv += ["--hidden", "2", "--epochs", 10**6, "--lr-decay", "cosine"]
    training = subprocess.Popen(
        [sys.executable, "-m", "fastbn", *map(str, argv)], stdout=subprocess.PIPE, text=True
    )
    with training:
        assert training.stdout.readline().startswith("epoch ")
        senders = [
            subprocess.Popen([sys.executable, "-c", code, str(folder), first])
            for first in ("1000", "2000")
        ]
        assert [process.wait() for process in senders] == [0, 0]
        assert send(folder, Nudge(stop=True))
        out, _ = training.communicate()
    assert training.returncode == 0
    told = log_of(folder)
    rates = [nudge.lr for _, nudge, _ in told.marks[:-1]]
    assert Counter(rates) == Counter([*range(1000, 1040), *range(2000, 2040)])
    for first in (1000, 2000):  # each sender's own in the order in which it sent them
        own = [rate for rate in rates if first <= rate < first + 1000]
        assert own == sorted(own)
    assert len([event for event in told.events if event["event"] == "refused"]) == 0
    assert out.count("nudge before epoch") == 81
    assert told.answered == 81
    assert all(later >= earlier for (earlier, *_), (later, *_) in pairwise(told.marks))
