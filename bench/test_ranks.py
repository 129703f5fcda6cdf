"""Synchronised batch norm on 1 and 2 ranks of MPI, beside the same layer without messages.

A minibatch of the shape is shared by the ranks, of one thread each. `docs/distributed.md` compares
with a model.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from replay import replay, replay_clock

from fastbn.cli.cases import CORES

MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
SHAPES = ["(32, 64, 56, 56)", "(32, 256, 14, 14)", "(32, 512, 7, 7)", "(64, 256)"]
NAMES = [f"{shape} {how}" for shape in SHAPES for how in ("alone", "synchronised")]
NAMES += [f"message of {size} bytes" for size in (1552, 6160, 49168)]


@cache
def measured(size):
    words = [MPIEXEC, "-n", str(size), sys.executable, Path(__file__).parent / "ranks.py"]
    environment = {**os.environ, "FASTBN_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.skipif(
    MPIEXEC is None or find_spec("mpi4py") is None, reason="needs mpiexec and mpi4py"
)
@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, size, benchmark):
    if size > CORES:
        pytest.skip(f"{size} ranks need as many CPUs")
    benchmark.group = name
    benchmark.extra_info = {"contender": "fastbn", "ranks": size}
    replay(benchmark, measured(size)[name])
