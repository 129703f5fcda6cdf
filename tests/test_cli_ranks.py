"""--mpi and --local-norm where there is no MPI, or one rank; test_mpi.py starts several."""

import sys
from types import SimpleNamespace

import pytest
from support import write_blobs
from test_cli import run

from fastbn.demo import DemoError
from fastbn.demo.config import configure
from fastbn.demo.data import load
from fastbn.demo.train import Trainer


@pytest.fixture
def blobs(tmp_path):
    return ["train", "--data", write_blobs(tmp_path), "--hidden", "8,8", "--epochs", "1"]


def test_local_norm_needs_ranks(blobs, capsys):
    status, out, err = run([*blobs, "--local-norm"], capsys)
    assert (status, out) == (2, "")
    assert err == "fastbn train: error: --local-norm: expected --mpi as well\n"


def test_mpi_without_mpi4py_names_the_extra(blobs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    status, out, err = run([*blobs, "--mpi"], capsys)
    assert (status, out) == (2, "")
    assert 'pip install "fastbn[mpi]"' in err


def test_mpi4py_without_a_library_of_mpi_names_the_extra(blobs, capsys, monkeypatch):
    def fails(module, extra):
        raise RuntimeError("cannot load MPI library")

    monkeypatch.setattr("fastbn.cli.ranks.require", fails)
    status, out, err = run([*blobs, "--mpi"], capsys)
    assert (status, out) == (2, "")
    words = '--mpi: cannot load MPI library: pip install "fastbn[mpi]"'
    assert err == f"fastbn train: error: {words}\n"


def test_ranks_that_do_not_find_each_other_are_refused(blobs, capsys, monkeypatch):
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(rank=0, size=1))
    monkeypatch.setattr("fastbn.cli.ranks.require", lambda module, extra: alone)
    monkeypatch.setenv("PMI_SIZE", "2")
    status, out, err = run([*blobs, "--mpi"], capsys)
    assert (status, out) == (2, "")
    assert "--mpi: expected the mpiexec of the MPI that mpi4py uses" in err


def test_a_folder_is_for_one_process(tmp_path, capsys):
    status, out, err = run(["resume", tmp_path, "--mpi"], capsys)
    assert (status, out) == (2, "")
    assert "--mpi: cannot be used with a folder" in err


def test_local_norm_is_of_batch_norm(blobs):
    with pytest.raises(DemoError, match="--local-norm: expected --norm batch, got True"):
        configure({"local_norm": True, "norm": "none"})


@pytest.mark.parametrize(("local_norm", "least"), [(False, 4), (True, 8)])
def test_a_minibatch_must_do_for_all_ranks(blobs, local_norm, least):
    config = configure({"data": blobs[2], "batch_size": least - 1, "local_norm": local_norm})
    trainer = Trainer(config, load(config.data))
    words = f"--batch-size: expected at least {least} for 4 ranks, got {least - 1}"
    with pytest.raises(DemoError, match=words):
        trainer.join(SimpleNamespace(rank=0, size=4))
