"""The layers and the demo on the ranks of a real MPI: each test starts mpiexec."""

import re
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
from ranks import VERSION, mpiexec, needs_mpi, run_mpi
from support import write_blobs
from test_cli import LAST_LINE, is_png

from fastbn.demo.checkpoint import load_checkpoint

pytestmark = needs_mpi
PROGRAM = Path(__file__).parent / "mpi_program.py"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_is_the_same_over_real_messages(size):
    status, out, err = run_mpi(size, "-m", "mpi4py", PROGRAM, size)
    assert status == 0, err
    assert out.startswith("all checked on")


def test_the_program_of_the_page_trains_the_same_on_any_number_of_ranks(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    [block] = [block for block in blocks if "import fastbn" in block]
    program = tmp_path / "train.py"
    program.write_text(textwrap.dedent(block).partition("mpiexec")[0], encoding="utf-8")
    losses = set()
    for size in (1, 2):
        status, out, err = run_mpi(size, "-m", "mpi4py", program)
        assert status == 0, err
        losses.add(out)
    assert len(losses) == 1
    assert 0 < float(losses.pop().removeprefix("loss: ")) < 0.5


@pytest.fixture
def blobs(tmp_path):
    """Return words that train a small network shortly, on data that are easy to learn."""
    for module in ("safetensors", "tqdm", "threadpoolctl"):
        pytest.importorskip(module)
    return ["train", "--mpi", "--data", write_blobs(tmp_path), "--hidden", "8,8"]


MAIN = "\nimport sys\nfrom fastbn.cli import main\nsys.exit(main())"


def fastbn(size, *words, code="", timeout=60):
    """Run the command line on so many ranks, after some code."""
    return run_mpi(size, "-c", code + MAIN, *words, timeout=timeout)


def curve(path):
    history = load_checkpoint(path, {}).history
    return np.array([list(epoch.values()) for epoch in history])


def test_the_demo_learns_the_same_on_two_ranks(tmp_path):
    for module in ("safetensors", "sklearn", "tqdm", "threadpoolctl"):
        pytest.importorskip(module)
    accuracies, curves = [], []
    for size in (1, 2):
        file = tmp_path / f"on {size}"
        status, out, err = fastbn(size, "train", "--mpi", "--epochs", 5, "--save", file)
        assert status == 0, err
        *epochs, last = out.splitlines()
        assert len(epochs) == 5
        accuracies.append(float(LAST_LINE.fullmatch(last)[1]))
        curves.append(curve(file))
    assert min(accuracies) >= 0.96
    assert abs(accuracies[0] - accuracies[1]) <= 0.01
    np.testing.assert_allclose(*curves, rtol=0, atol=1e-4)


# In the third epoch something happens on rank 1 alone.
IN_THE_THIRD_EPOCH = """
import os, signal, time
from mpi4py import MPI
from fastbn.demo.train import Trainer
train_epoch = Trainer.train_epoch
def happens(self, title):
    if len(self.history) == 2 and MPI.COMM_WORLD.rank == 1:
        {}
    return train_epoch(self, title)
Trainer.train_epoch = happens
"""


def test_a_killed_rank_ends_the_run_and_any_number_of_ranks_goes_on(blobs, tmp_path):
    whole, file, copy = (tmp_path / name for name in ("whole", "part", "copy"))
    words = [*blobs, "--epochs", 4, "--save"]
    status, out, err = fastbn(2, *words, whole)
    assert status == 0, err
    last = out.splitlines()[-1]
    kill = IN_THE_THIRD_EPOCH.format("os.kill(os.getpid(), signal.SIGKILL)")
    status, out, err = fastbn(2, *words, file, code=kill, timeout=30)
    assert status != 0
    assert re.search(r"signal 9|EXIT CODE: 9", out + err)  # mpiexec tells
    assert len(curve(file)) == 2
    copy.write_bytes(file.read_bytes())
    status, out, err = fastbn(2, "resume", file, "--mpi")
    assert (status, out.splitlines()[-1]) == (0, last), err
    np.testing.assert_array_equal(curve(file), curve(whole))
    status, out, err = fastbn(3, "train", "--resume", copy, "--mpi")
    assert (status, len(out.splitlines())) == (0, 3), err
    np.testing.assert_allclose(curve(copy), curve(whole), rtol=0, atol=1e-4)


def test_a_rank_that_fails_alone_ends_the_others_with_a_message(blobs, tmp_path):
    fail = IN_THE_THIRD_EPOCH.format("raise OSError('no more memory')")
    fail += "from fastbn.cli import ranks\nranks.PATIENCE = 1\n"
    status, out, err = fastbn(2, *blobs, "--epochs", 4, code=fail, timeout=30)
    assert status != 0
    assert "error: rank 1 of 2: no more memory" in err
    assert len(out.splitlines()) == 2


def test_what_fails_on_all_ranks_is_told_once(blobs):
    status, out, err = fastbn(2, *blobs, "--batch-size", 3, "--local-norm")
    assert status == 2
    assert out.count("--batch-size") + err.count("--batch-size") == 1
    assert "fastbn train: error: --batch-size: expected at least 4 for 2 ranks, got 3" in err


def test_ctrl_c_tells_how_to_go_on(blobs, tmp_path):
    file = tmp_path / "run"
    wait = IN_THE_THIRD_EPOCH.format("print('waits', flush=True); time.sleep(60)")
    wait = wait.replace("== 1", "< 2")  # on both
    with mpiexec(2, "-c", wait + MAIN, *blobs, "--epochs", 4, "--save", file) as process:
        while "waits" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    if "Open MPI" not in VERSION:  # whose mpiexec gives the ranks no time to say it
        assert re.search(rf"mpiexec -n 2 .* -m fastbn resume {file} --mpi", err)
    assert len(curve(file)) == 2


def test_local_norm_trains_and_one_process_can_read_it(blobs, tmp_path):
    file, weights = tmp_path / "run", tmp_path / "w.safetensors"
    words = [*blobs, "--local-norm", "--epochs", 3, "--save", file, "--export", weights]
    status, out, err = fastbn(2, *words)
    assert status == 0, err
    assert len(out.splitlines()) == 6  # told once
    trainer = load_checkpoint(file, {})
    assert trainer.config.local_norm
    accuracy = trainer.evaluate(trainer.data.test)[1]
    assert out.splitlines()[-1] == f"test accuracy: {accuracy:.4f}"


def test_compare_takes_several_ranks(blobs, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curves.png"
    status, out, err = fastbn(2, *blobs, "--epochs", 2, "--compare", "--plot", plot)
    assert status == 0, err
    assert is_png(plot)
    assert len(out.splitlines()) == 10
