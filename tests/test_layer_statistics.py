"""Exact running statistics over a data set."""

import re

import numpy as np
import pytest
from layer_cases import assert_unchanged, snapshot

import fastbn
from fastbn import BatchNorm, InstanceNorm


def network(rng):
    """A plain network of two batch norms; the second sees what the first one makes."""
    weight = rng.standard_normal((3, 3))
    first, second = BatchNorm(3), BatchNorm(3)

    def linear(x):
        return np.maximum(x, 0) @ weight

    return first, linear, second


def test_exact_statistics_are_those_of_all_batches(rng):
    first, linear, second = layers = network(rng)
    first(100 + rng.standard_normal((50, 3)))  # what is there is replaced
    second.eval()
    batches = [3 + rng.standard_normal((n, 3)) for n in (2, 30, 5)]
    seen = [linear(fastbn.batch_norm(batch)[0]) for batch in batches]
    for forward in (None, lambda batch: second(linear(first(batch)))):
        fastbn.update_statistics(layers, iter(batches), forward)
        for bn, inputs in ((first, batches), (second, seen)):
            everything = np.concatenate(inputs)
            np.testing.assert_allclose(bn.running_mean, everything.mean(0), rtol=1e-14)
            np.testing.assert_allclose(bn.running_var, everything.var(0, ddof=1), rtol=1e-13)
            assert bn.num_batches_tracked == 3
    assert first.training
    assert not second.training


def test_statistics_are_those_of_training_whatever_the_mode(rng):
    batches = 5 + 3 * rng.standard_normal((4, 8, 3, 10))
    found = []
    for training in (True, False):
        norm, bn = InstanceNorm(3, track_running_stats=True), BatchNorm(3)
        norm.train(training)
        bn.train(training)
        fastbn.update_statistics([norm, bn], batches)
        assert (norm.training, bn.training) == (training, training)
        assert (norm.num_batches_tracked, bn.num_batches_tracked) == (0, 4)
        np.testing.assert_array_equal(norm.running_mean, 0)
        found.append([bn.running_mean, bn.running_var])
    np.testing.assert_array_equal(found[0], found[1])


def test_statistics_updated_inside_of_an_update_do_not_disturb_it(rng):
    bn, x = BatchNorm(3), rng.standard_normal((5, 3))

    def forward(batch):
        with pytest.raises(ValueError, match="x: expected 3 channels"):
            fastbn.update_statistics([bn], [batch[:, :2]])
        bn(batch)

    fastbn.update_statistics([bn], [x], forward)
    np.testing.assert_allclose(bn.running_mean, x.mean(0), rtol=1e-14)


def test_backward_is_of_the_minibatch_before_statistics_were_updated(rng):
    x, dy = rng.standard_normal((2, 5, 3))
    bn = BatchNorm(3)

    def forward(batch):
        bn(batch)
        if len(batch) == 5:
            raise OSError("no more data")

    bn(x)
    wanted = bn.backward(dy)
    fastbn.update_statistics([bn], [rng.standard_normal((8, 3))])
    np.testing.assert_array_equal(bn.backward(dy), wanted)
    with pytest.raises(OSError, match="no more data"):
        fastbn.update_statistics([bn], [rng.standard_normal((5, 3))], forward)
    np.testing.assert_array_equal(bn.backward(dy), wanted)


def test_statistics_that_cannot_be_updated_are_left(rng):
    first, linear, second = layers = network(rng)
    first(rng.standard_normal((5, 3)))
    before = snapshot(first), snapshot(second)
    batch = rng.standard_normal((4, 3))

    def failing():
        yield batch
        raise OSError("no more data")

    cases = [
        (lambda: fastbn.update_statistics([linear], [batch]), ValueError,
         "layers: expected a BatchNorm with running statistics, got none"),
        (lambda: fastbn.update_statistics(layers, []), ValueError,
         "batches: expected one or more that go through every BatchNorm in layers, "
         "got [0, 0] for the 2 of them"),
        (lambda: fastbn.update_statistics(layers, [batch], lambda x: first(x)), ValueError,
         "got [1, 0] for the 2 of them"),
        (lambda: fastbn.update_statistics(first, [batch]), TypeError,
         "layers: expected an iterable, got BatchNorm"),
        (lambda: fastbn.update_statistics(layers, 3), TypeError,
         "batches: expected an iterable, got int"),
        (lambda: fastbn.update_statistics(layers, failing()), OSError, "no more data"),
        (lambda: fastbn.update_statistics(layers, [batch[:, :2]]), ValueError, "x: expected 3"),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
        assert_unchanged(first, before[0])
        assert_unchanged(second, before[1])
        assert first.training
        assert second.training
    first(batch)
    assert first.num_batches_tracked == 2  # and they move again


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_cannot_be_written_leave_those_of_all_layers(rng, name):
    layers = [BatchNorm(3), BatchNorm(3)]
    before = [snapshot(bn) for bn in layers]
    getattr(layers[1], name).flags.writeable = False
    with pytest.raises(ValueError, match=f"{name}: expected the layer to have a writeable array"):
        fastbn.update_statistics(layers, [rng.standard_normal((5, 3))])
    for bn, state in zip(layers, before, strict=True):
        assert_unchanged(bn, state)
