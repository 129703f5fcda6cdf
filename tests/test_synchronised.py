"""BatchNorm(comm=): a minibatch whose parts lie on several ranks."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
from ranks import on_ranks
from sync_cases import FUSED, LAYOUTS, PARTS, assert_one_process, trained_part

import fastbn
from fastbn import BatchNorm


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "cuts"), PARTS, ids=str)
def test_all_ranks_together_are_one_process(size, cuts, layout, fused):
    def of_rank(comm):
        found = trained_part(comm, cuts, layout, fused)
        assert comm.messages == 4  # one each way, two steps
        return found

    assert_one_process(on_ranks(size, of_rank), layout, fused)


def test_gradients_are_those_of_finite_differences(rng):
    x, dy = rng.standard_normal((2, 9, 2))

    def loss(x, comm):
        bn = BatchNorm(2, dtype=np.float64, comm=comm)
        y = bn(np.split(x, [4, 4])[comm.rank])
        part = np.split(dy, [4, 4])[comm.rank]
        return (y * part).sum(), bn.backward(part)

    dx = np.concatenate([each for _, each in on_ranks(3, lambda comm: loss(x, comm))])
    for at in [(0, 0), (3, 1), (8, 0)]:
        values = []
        for h in (1e-6, -1e-6):
            moved = x.copy()
            moved[at] += h
            values.append(sum(each for each, _ in on_ranks(3, partial(loss, moved))))
        np.testing.assert_allclose(dx[at], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8)


BAD = {
    "channels": (lambda x: (x[:, :3],), "x: expected 5 channels"),
    "text": (lambda x: (x.astype(str),), "x: expected float16"),
    "residual": (lambda x: (x, x[:-1]), "residual: expected shape"),
    "dtype": (lambda x: (x, x.astype(np.float64)), "residual: expected dtype"),
    "mask": (lambda x: (x, None, np.ones(3, bool)), "mask: expected shape"),
    "mask of integers": (lambda x: (x, None, np.ones(len(x), int)), "mask: expected bool"),
}


@pytest.mark.parametrize("renorm", [None, (3, 5)])
@pytest.mark.parametrize("which", BAD)
def test_bad_input_on_one_rank_raises_on_all_and_names_the_rank(which, renorm, rng):
    x = rng.standard_normal((8, 5)).astype(np.float32)
    arguments, message = BAD[which]

    def of_rank(comm):
        bn = BatchNorm(5, comm=comm, renorm=renorm)
        before = bn.state_dict()
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            bn(*(arguments(x) if comm.rank == 1 else (x,)))
        for key, value in bn.state_dict().items():
            np.testing.assert_array_equal(value, before[key])
        assert bn(x).shape == x.shape  # the ranks are still together
        return caught.value

    first, bad, last = on_ranks(3, of_rank)
    assert str(bad).startswith(message)
    assert bad.__notes__ == ["on rank 1 of 3; the other ranks raise as well"]
    for error in (first, last):
        assert type(error) is RuntimeError
        assert str(error) == f"rank 1 of 3: {type(bad).__name__}: {bad}"


def test_what_fails_on_several_ranks_is_told_of_all(rng):
    x = rng.standard_normal((8, 5))
    errors = on_ranks(3, lambda comm: BatchNorm(5, comm=comm)(x[:, comm.rank :]))
    assert str(errors[0]) == (
        "rank 1 of 3: ValueError: x: expected 5 channels on axis 1, got shape (8, 4); "
        "rank 2 of 3: ValueError: x: expected 5 channels on axis 1, got shape (8, 3)"
    )
    assert [type(error) for error in errors] == [RuntimeError, ValueError, ValueError]


def test_a_long_text_is_cut():
    def of_rank(comm):
        def forward(x):
            raise OSError("ü" * 2000)

        bn = BatchNorm(1)
        fastbn.update_statistics([bn], [np.ones((2, 1))], forward if comm.rank else None, comm=comm)

    first, _ = on_ranks(2, of_rank)
    assert str(first).startswith("rank 1 of 2: OSError: üüü")
    assert len(str(first)) < 1100


def test_bad_dy_on_one_rank_raises_on_all(rng):
    x = rng.standard_normal((8, 5))

    def of_rank(comm):
        bn = BatchNorm(5, dtype=np.float64, comm=comm)
        y = bn(x)
        with pytest.raises((ValueError, RuntimeError)) as caught:
            bn.backward(y[: 8 - comm.rank])
        assert not bn.grads["gamma"].any()
        bn.backward(y)
        return str(caught.value)

    first, bad = on_ranks(2, of_rank)
    assert first == f"rank 1 of 2: ValueError: {bad}"
    assert bad.startswith("dy: expected shape (8, 5)")


def test_one_value_on_all_ranks_together_is_too_few():
    errors = on_ranks(3, lambda comm: BatchNorm(2, comm=comm)(np.ones((int(comm.rank == 1), 2))))
    for error in errors:
        assert type(error) is ValueError
        assert str(error).startswith("x: expected more than one value per channel on all ranks")


def test_one_value_a_rank_is_enough():
    y = on_ranks(2, lambda comm: BatchNorm(1, eps=0, comm=comm)(np.array([[2.0 * comm.rank]])))
    np.testing.assert_array_equal(y, [[[-1]], [[1]]])


def test_evaluation_and_frozen_layers_send_nothing(rng):
    def of_rank(comm):
        x = rng.standard_normal((4, 2))
        for bn in (BatchNorm(2, comm=comm).eval(), BatchNorm(2, comm=comm).freeze()):
            bn.backward(bn(x))
        BatchNorm(2, track_running_stats=False, comm=comm).eval()(x)
        return comm.messages

    assert on_ranks(2, of_rank) == [0, 0]


def test_backward_goes_by_the_forward_pass_whatever_comm_is_now(rng):
    def of_rank(comm):
        bn = BatchNorm(2, comm=comm)
        y = bn(rng.standard_normal((4, 2)))
        bn.comm = None
        bn.backward(y)
        return comm.messages

    assert on_ranks(1, of_rank) == [2]


def test_copies_leave_the_communicator_out(rng):
    x = rng.standard_normal((6, 2))

    def of_rank(comm):
        bn = BatchNorm(2, comm=comm)
        bn(x)
        for twin in (copy.deepcopy(bn), copy.copy(bn), pickle.loads(pickle.dumps(bn))):
            assert twin.comm is None
            np.testing.assert_array_equal(twin.running_mean, bn.running_mean)
        return repr(bn)

    assert on_ranks(1, of_rank)[0].endswith("virtual_batch_size=None, comm=<rank 0 of 1>)")


def test_virtual_batches_are_refused(rng):
    def of_rank(comm):
        with pytest.raises(ValueError, match="virtual_batch_size: expected None where there is a"):
            BatchNorm(2, virtual_batch_size=4, comm=comm)
        bn = BatchNorm(2, comm=comm)
        if comm.rank:
            bn.virtual_batch_size = 4
        bn(rng.standard_normal((8, 2)))

    first, bad = on_ranks(2, of_rank)
    assert "rank 1 of 2: ValueError: virtual_batch_size: expected None" in str(first)
    assert type(bad) is ValueError


def test_what_is_no_communicator_is_refused():
    message = (
        "comm: expected a communicator of mpi4py, or an object with rank, size, Allgather, got"
    )
    with pytest.raises(TypeError, match=f"{message} str without rank, size, Allgather"):
        BatchNorm(2, comm="world")
    bn = BatchNorm(2)
    with pytest.raises(TypeError, match=message):
        bn.comm = 1
    with pytest.raises(TypeError, match=message):
        fastbn.update_statistics([bn], [np.ones((2, 2))], comm=1)


@pytest.mark.parametrize(("synchronised", "given"), [(True, True), (True, False), (False, True)])
def test_exact_statistics_over_the_batches_of_all_ranks(synchronised, given, rng):
    batches = 1e4 + rng.standard_normal((6, 12, 5)).astype(np.float32)
    whole = BatchNorm(5)
    fastbn.update_statistics([whole], list(batches))

    def of_rank(comm):
        bn = BatchNorm(5, comm=comm if synchronised else None)
        if synchronised:  # each minibatch in parts, one empty
            mine = [np.split(batch, [5, 5])[comm.rank] for batch in batches]
        else:  # whole minibatches, none on the last rank
            mine = [batches[:2], batches[2:], []][comm.rank]
        fastbn.update_statistics([bn], mine, comm=comm if given else None)
        return bn.running_mean, bn.running_var, bn.num_batches_tracked

    ranks = on_ranks(3, of_rank)
    for mean, var, count in ranks:
        assert count == 6
        np.testing.assert_array_equal(mean, ranks[0][0])
        np.testing.assert_array_equal(var, ranks[0][1])
        np.testing.assert_allclose(mean, whole.running_mean, rtol=1e-15)
        np.testing.assert_allclose(var, whole.running_var, rtol=1e-13)


def test_exact_statistics_that_fail_on_one_rank_fail_on_all():
    def of_rank(comm):
        bn = BatchNorm(2)
        with pytest.raises((RuntimeError, ValueError)) as caught:
            fastbn.update_statistics([bn], [np.ones((2 + comm.rank, 2 + comm.rank))], comm=comm)
        assert bn.num_batches_tracked == 0
        with pytest.raises(ValueError, match=r"batches: expected one or more .* got \[0\] for"):
            fastbn.update_statistics([bn], [], comm=comm)
        return str(caught.value)

    first, bad = on_ranks(2, of_rank)
    assert first == f"rank 1 of 2: ValueError: {bad}"
