"""fastbn.distributed: gradients averaged over ranks, replicas, parts of the examples."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from optim_cases import VARIANTS, layer_of
from ranks import on_ranks

import fastbn
from fastbn import distributed
from fastbn.distributed import average_gradients, broadcast, gradients, split
from fastbn.optim import SGD, GradientClipping, WeightDecay

EXAMPLES = [5, 0, 2]


def gradients_of(rank, dtype=np.float32):
    rng = np.random.default_rng(rank)
    shapes = {"W": (7, 3), "b": (1,), "gamma": (4,)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def layer_with(grads, dtype=np.float32):
    layer = layer_of(**{name: np.zeros_like(g, dtype) for name, g in grads.items()})
    layer.grads = grads
    return layer


@pytest.mark.parametrize("bucket", [1 << 20, 4])
@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_are_the_average_with_the_same_bits_on_all_ranks(
    dtype, uneven, bucket, monkeypatch
):
    monkeypatch.setattr(gradients, "BUCKET", bucket)
    weights = EXAMPLES if uneven else [1, 1, 1]
    each = [gradients_of(rank, dtype) for rank in range(3)]
    wanted = {n: np.sum([g[n] for g in each], axis=0, dtype=float) / sum(weights) for n in each[0]}

    def of_rank(comm):
        layer = layer_with(gradients_of(comm.rank, dtype), dtype)
        layer.grads["W"] = np.asfortranarray(layer.grads["W"])
        optimizer = SGD(layer, lr=1.0)
        examples = (lambda: EXAMPLES[comm.rank]) if uneven else None
        optimizer.register_step_pre_hook(average_gradients(comm, examples))
        optimizer.step()
        return layer

    for layer in on_ranks(3, of_rank):
        for name, exact in wanted.items():
            found = layer.grads[name]
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, exact.astype(dtype))
            np.testing.assert_array_equal(layer.params[name], -found)


def test_gradients_of_both_types_are_averaged():
    def of_rank(comm):
        wide = layer_with({"W": np.full(3, 1.0 + comm.rank)}, np.float64)
        short = layer_with({"b": np.full(2, 5.0 - comm.rank, np.float32)})
        optimizer = SGD([wide, short], lr=1.0)
        optimizer.register_step_pre_hook(average_gradients(comm))
        optimizer.step()
        return wide.grads["W"].tolist(), short.grads["b"].tolist()

    assert on_ranks(2, of_rank) == [([1.5] * 3, [4.5] * 2)] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_optimizer_trains_ranks_like_one_process(variant):
    kind, options = VARIANTS[variant]
    x = np.random.default_rng(1).standard_normal((11, 4)).astype(np.float32)
    dy = np.random.default_rng(2).standard_normal((11, 4)).astype(np.float32)

    def train(comm=None, attached=False):
        bn = fastbn.BatchNorm(4, comm=comm)
        optimizer = kind(bn, **options)
        rows = slice(None) if comm is None else split(11, comm)
        scale = np.float32(1 if comm else 1 / 11)
        if comm is not None:
            optimizer.register_step_pre_hook(average_gradients(comm, lambda: len(x[rows])))
        optimizer.register_step_pre_hook(WeightDecay(0.01))
        optimizer.register_step_pre_hook(GradientClipping(0.1))
        if attached:
            optimizer.attach()
        for _ in range(3):
            bn(x[rows])
            bn.backward(dy[rows] * scale)
            if not attached:
                optimizer.step()
        return bn.state_dict()

    wanted = train()
    for attached in (False, True):
        for state in on_ranks(3, lambda comm, attached=attached: train(comm, attached)):
            for name, values in state.items():
                np.testing.assert_allclose(values, wanted[name], rtol=0, atol=3e-5)


def test_nan_reaches_all_ranks_and_nothing_warns():
    def of_rank(comm):
        values = [np.nan, np.inf, 1] if comm.rank else [1, -np.inf, 3]
        layer = layer_with({"W": np.array(values, np.float32)})
        average_gradients(comm)(SimpleNamespace(stepping=(layer,)))
        return layer.grads["W"]

    for grad in on_ranks(2, of_rank):
        np.testing.assert_array_equal(grad, [np.nan, np.nan, 2])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda layer: layer.grads["W"].setflags(write=False), "grads['W']: expected a writeable"),
        (lambda layer: layer.grads.update(W=None), "grads['W']: expected ndarray of float32 or"),
        (lambda layer: layer.grads.update(W=np.ones(3, int)), "grads['W']: expected ndarray of"),
        (lambda layer: layer.grads.pop("W"), "'W'"),
    ],
)
def test_a_bad_gradient_on_one_rank_raises_on_all(what, message):
    def of_rank(comm):
        layer = layer_with(gradients_of(comm.rank))
        hook = average_gradients(comm)
        if comm.rank == 1:
            what(layer)
        with pytest.raises((TypeError, ValueError, KeyError, RuntimeError)) as caught:
            hook(SimpleNamespace(stepping=(layer,)))
        np.testing.assert_array_equal(layer.grads["gamma"], gradients_of(comm.rank)["gamma"])
        return caught.value

    first, bad = on_ranks(2, of_rank)
    assert str(bad).startswith(message)
    assert str(first) == f"rank 1 of 2: {type(bad).__name__}: {bad}"


def test_ranks_that_do_not_fit_together_are_refused():
    def of_rank(comm):
        layer = layer_with({"W": np.ones(3 + (comm.rank == 2), np.float32)})
        average_gradients(comm)(SimpleNamespace(stepping=(layer,)))

    for error in on_ranks(3, of_rank):
        assert str(error) == "grads: expected as many values on each rank, got [3, 3, 4]"


def test_examples_are_checked():
    def of_rank(comm, examples):
        layer = layer_with({"W": np.ones(3, np.float32)})
        average_gradients(comm, lambda: examples[comm.rank])(SimpleNamespace(stepping=(layer,)))

    for error in on_ranks(2, lambda comm: of_rank(comm, [0, 0])):
        assert str(error) == "examples(): expected some on all ranks together, got 0"
    first, bad = on_ranks(2, lambda comm: of_rank(comm, [1, -1]))
    assert str(bad) == "examples(): expected an integer >= 0, got -1"
    assert str(bad) in str(first)
    with pytest.raises(TypeError, match="examples: expected a callable, got int"):
        on_alone(lambda comm: average_gradients(comm, 3))


def on_alone(function):
    (result,) = on_ranks(1, function)
    if isinstance(result, Exception):
        raise result
    return result


@pytest.mark.parametrize("function", [average_gradients, lambda comm: broadcast([], comm)])
def test_what_is_no_communicator_is_refused(function):
    with pytest.raises(TypeError, match="comm: expected a communicator of mpi4py, or an object"):
        function(SimpleNamespace(rank=0, size=1, Allgather=None))


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast_gives_all_ranks_the_state_of_one(root):
    def of_rank(comm):
        rng = np.random.default_rng(comm.rank)
        bn, norm = fastbn.BatchNorm(3), fastbn.InstanceNorm(2, affine=True, dtype=np.float64)
        optimizer = fastbn.optim.Adam([bn, norm], lr=0.1 * (1 + comm.rank))
        for _ in range(1 + comm.rank):
            bn.backward(bn(rng.standard_normal((9, 3)).astype(np.float32)))
            norm.backward(norm(rng.standard_normal((3, 2, 4))))
            optimizer.step()
        before = [each.state_dict() for each in (bn, norm, optimizer)]
        broadcast([bn, norm, optimizer], comm, root)
        return before, [each.state_dict() for each in (bn, norm, optimizer)]

    ranks = on_ranks(3, of_rank)
    for _, after in ranks:
        for found, wanted in zip(after, ranks[root][0], strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                np.testing.assert_array_equal(found[key], value)
                assert np.asarray(found[key]).dtype == np.asarray(value).dtype


def test_broadcast_refuses_other_layers_and_changes_nothing():
    def of_rank(comm):
        bn = fastbn.BatchNorm(3 + (comm.rank == 1))
        bn.gamma = np.full(bn.num_features, comm.rank)
        with pytest.raises(ValueError, match="layers: expected those of rank 2 on all, got others"):
            broadcast([bn], comm, 2)
        return bn.gamma[0]

    assert on_ranks(3, of_rank) == [0, 1, 2]
    state = SimpleNamespace(state_dict=lambda: {"name": np.array([None])})
    with pytest.raises(TypeError, match="name: expected numbers, got object"):
        on_alone(lambda comm: broadcast([state], comm))
    with pytest.raises(ValueError, match="root: expected an integer from 0 to 0, got 1"):
        on_alone(lambda comm: broadcast([], comm, 1))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_parts_are_all_examples_in_order(n, size):
    parts = [list(range(n))[split(n, SimpleNamespace(rank=r, size=size))] for r in range(size)]
    assert list(chain(*parts)) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_of_nothing_sensible_is_refused():
    comm = SimpleNamespace(rank=0, size=2)
    with pytest.raises(ValueError, match="n: expected an integer >= 0, got -1"):
        split(-1, comm)
    with pytest.raises(TypeError, match="n: expected an integer, got float"):
        split(2.0, comm)


def test_the_public_names_have_docstrings():
    for name in distributed.__all__:
        assert getattr(distributed, name).__doc__
