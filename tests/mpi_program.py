"""What each rank runs under mpiexec, for test_mpi.py: layers and functions over real messages."""

import sys

import numpy as np
import pytest
from mpi4py import MPI
from sync_cases import FUSED, LAYOUTS, PARTS, assert_one_process, trained_part

import fastbn
from fastbn.distributed import average_gradients, broadcast, split
from fastbn.optim import SGD


def check_layers(comm):
    for size, cuts in PARTS:
        for layout in LAYOUTS if size == comm.size else ():
            for fused in FUSED:
                found = comm.allgather(trained_part(comm, cuts, layout, fused))
                assert_one_process(found, layout, fused)


def check_bad_input(comm):
    x = np.random.default_rng(0).standard_normal((4, 5))
    bn = fastbn.BatchNorm(5, comm=comm)
    last = comm.size - 1
    alone = "x: expected 5 channels"
    told = f"rank {last} of {comm.size}: ValueError: {alone}"
    for _ in range(2):  # the ranks are still together afterwards
        with pytest.raises(
            ValueError if comm.rank == last else RuntimeError,
            match=alone if comm.rank == last else told,
        ):
            bn(x[:, :4] if comm.rank == last else x)
    assert bn.num_batches_tracked == 0
    bn(x)


def check_statistics(comm):
    batches = 1e4 + np.random.default_rng(1).standard_normal((5, 6, 3)).astype(np.float32)
    bn, whole = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    fastbn.update_statistics([bn], batches[split(5, comm)], comm=comm)
    fastbn.update_statistics([whole], batches)
    found = comm.allgather((bn.running_mean.tobytes(), bn.running_var.tobytes()))
    assert len(set(found)) == 1
    np.testing.assert_allclose(bn.running_mean, whole.running_mean, rtol=1e-15)
    np.testing.assert_allclose(bn.running_var, whole.running_var, rtol=1e-13)
    assert bn.num_batches_tracked == 5


def check_gradients(comm):
    gradients = [np.random.default_rng(r).standard_normal(1_100_003) for r in range(comm.size)]
    bn = fastbn.BatchNorm(1_100_003, dtype=np.float64)
    bn.gamma = bn.gamma * (1 + comm.rank)
    broadcast([bn], comm, root=comm.size - 1)
    assert bn.gamma[0] == comm.size
    optimizer = SGD(bn, lr=1.0)
    optimizer.register_step_pre_hook(average_gradients(comm, lambda: 2 * comm.rank + 1))
    bn.grads["gamma"] = gradients[comm.rank].astype(np.float32)
    bn.grads["beta"][:] = gradients[comm.rank]
    optimizer.step()
    total = np.zeros(1_100_003)
    for each in gradients:
        total += each
    np.testing.assert_array_equal(bn.grads["beta"], total / comm.size**2)
    np.testing.assert_allclose(bn.grads["gamma"], total / comm.size**2, rtol=0, atol=1e-6)
    assert len(set(comm.allgather(bn.gamma.tobytes()))) == 1


if __name__ == "__main__":
    comm = MPI.COMM_WORLD
    assert comm.size == int(sys.argv[1])
    for check in (check_layers, check_bad_input, check_statistics, check_gradients):
        check(comm)
    if comm.rank == 0:
        print("all checked on", MPI.Get_library_version().split("\n")[0])
