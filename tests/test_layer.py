"""The layer in use: modes, running statistics, gradients, hooks, calls, and what it refuses."""

import re
import threading
from unittest import mock

import numpy as np
import pytest
from layer_cases import assert_unchanged, snapshot
from support import assert_close

import fastbn
from fastbn import BatchNorm, InstanceNorm, reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 3), 1), ((3, 8), 0), ((4, 3, 5, 5), 1), ((4, 5, 5, 3), -1)]
)
def test_training_follows_the_reference(variant, rng, shape, axis, dtype):
    bn = BatchNorm(3, axis=axis, dtype=dtype, momentum=0.3)
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    mean, var = np.zeros(3), np.ones(3)
    for step in range(1, 4):
        x, dy = rng.standard_normal((2, *shape)).astype(dtype)
        wanted, cache = reference.batch_norm(x, bn.gamma, bn.beta, axis=axis)
        assert_close(bn(x), wanted)
        gradients = reference.batch_norm_backward(dy, cache)
        assert_close(bn.backward(dy), gradients[0])
        assert_close(bn.grads["gamma"], gradients[1])
        assert_close(bn.grads["beta"], gradients[2])
        count = x.size // 3
        mean = 0.7 * mean + 0.3 * cache.mean
        var = 0.7 * var + 0.3 * cache.var * count / (count - 1)
        assert bn.running_mean.dtype == bn.running_var.dtype == np.float64
        assert_close(bn.running_mean, mean, scale=1)
        assert_close(bn.running_var, var)
        assert bn.num_batches_tracked == step


def test_momentum_none_averages_all_minibatches(rng):
    bn = BatchNorm(3, momentum=None)
    batches = rng.standard_normal((5, 16, 3))
    for x in batches:
        bn(x)
    np.testing.assert_allclose(bn.running_mean, batches.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, batches.var(1, ddof=1).mean(0), rtol=1e-12)


def test_momentum_of_one_keeps_the_last_minibatch(rng):
    bn = BatchNorm(3, momentum=1)
    for x in rng.standard_normal((2, 16, 3)):
        bn(x)
    np.testing.assert_array_equal(bn.running_mean, fastbn.batch_norm(x)[1].mean)


def test_evaluation_uses_the_running_statistics_and_leaves_them(rng):
    bn = BatchNorm(3)
    bn(rng.standard_normal((16, 3)) + 5)
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    assert bn.eval() is bn
    assert not bn.training
    before = snapshot(bn)
    x = rng.standard_normal((1, 3))  # one value per channel is enough here
    wanted = reference.batch_norm_inference(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta)
    assert_close(bn(x), wanted)
    assert_unchanged(bn, before)
    assert bn(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert bn.train() is bn
    assert bn.training


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5, 5), (4, 3, 30)])
def test_backward_in_evaluation_holds_the_statistics_constant(variant, rng, shape):
    bn = BatchNorm(3, dtype=np.float64)
    bn(rng.standard_normal(shape) * 3 + 5)
    bn.eval()
    bn.gamma[:] = rng.standard_normal(3)
    x, weight = rng.standard_normal((2, *shape))
    bn(x)
    dx = bn.backward(weight)
    columns = (1, 3) + (1,) * (len(shape) - 2)
    rstd = 1 / np.sqrt(bn.running_var + 1e-5)
    others = tuple(i for i in range(len(shape)) if i != 1)
    z_hat = (x - bn.running_mean.reshape(columns)) * rstd.reshape(columns)
    assert_close(dx, weight * (bn.gamma * rstd).reshape(columns))
    assert_close(bn.grads["gamma"], (weight * z_hat).sum(others))
    assert_close(bn.grads["beta"], weight.sum(others))


def test_backward_in_evaluation_is_not_moved_by_later_changes(rng):
    bn = BatchNorm(3)
    bn.eval()
    x = rng.standard_normal((6, 3)).astype(np.float32)
    bn(x)
    wanted = bn.backward(x)
    bn(x)
    bn.running_var[:] = 100
    bn.gamma[:] = 7
    np.testing.assert_array_equal(bn.backward(x), wanted)


def test_without_running_statistics_evaluation_uses_the_minibatch(rng):
    bn = BatchNorm(3, track_running_stats=False)
    assert bn.running_mean is bn.running_var is None
    x = rng.standard_normal((6, 3))
    trained = bn(x)
    np.testing.assert_array_equal(bn.eval()(x), trained)
    assert bn.state_dict().keys() == {"weight", "bias"}
    with pytest.raises(ValueError, match="expected more than one value per channel"):
        bn(x[:1])


def test_without_affine_there_are_no_parameters(rng):
    bn = BatchNorm(3, affine=False)
    assert bn.params == bn.grads == {}
    x = rng.standard_normal((6, 3))
    np.testing.assert_array_equal(bn(x), fastbn.batch_norm(x)[0])
    bn.backward(x)
    assert bn.grads == {}
    assert "weight" not in bn.state_dict()
    with pytest.raises(AttributeError, match=r"gamma: this layer has none, .*affine=False"):
        bn.gamma  # noqa: B018


def test_parameters_are_trained_in_place(rng):
    bn = BatchNorm(3)
    gamma = bn.gamma
    assert bn.params.keys() == bn.grads.keys() == {"gamma", "beta"}
    bn.gamma -= 0.5
    bn.params["gamma"] *= 2
    bn.beta = [1, 2, 3]
    assert bn.gamma is gamma is bn.params["gamma"]
    np.testing.assert_array_equal(gamma, [1, 1, 1])
    gradient = bn.grads["gamma"]
    x = rng.standard_normal((6, 3)).astype(np.float32)
    bn(x)
    bn.backward(x)
    assert bn.grads["gamma"] is gradient
    assert gradient.any()
    with pytest.raises(ValueError, match=r"gamma: expected shape \(3,\), got \(2,\)"):
        bn.gamma = [1, 2]
    with pytest.raises(TypeError, match="beta: expected numbers, got dtype <U1"):
        bn.beta = ["a", "b", "c"]


def test_grad_hooks_run_in_order_after_the_gradients_and_can_be_removed(rng):
    bn = BatchNorm(3)
    seen = []
    first = bn.register_grad_hook(lambda layer: seen.append(("first", layer.grads["beta"].copy())))
    bn.register_grad_hook(lambda layer: seen.append(("second", layer)))
    x = rng.standard_normal((6, 3)).astype(np.float32)
    bn(x)
    bn.backward(np.ones_like(x))
    assert [name for name, _ in seen] == ["first", "second"]
    np.testing.assert_array_equal(seen[0][1], 6)
    assert seen[1][1] is bn
    first.remove()
    first.remove()
    bn.backward(x)
    assert [name for name, _ in seen] == ["first", "second", "second"]


def test_backward_needs_a_forward_and_a_dy_that_fits(rng):
    bn = BatchNorm(3)
    x = rng.standard_normal((6, 3)).astype(np.float32)
    with pytest.raises(RuntimeError, match="backward: there was no forward pass"):
        bn.backward(x)
    bn(x)
    bn.register_grad_hook(lambda layer: pytest.fail("a hook ran after an error"))
    before = snapshot(bn)
    with pytest.raises(ValueError, match=r"dy: expected shape \(6, 3\), as x has, got \(5, 3\)"):
        bn.backward(x[:5])
    with pytest.raises(TypeError, match="dy: expected dtype float32, as x has, got float64"):
        bn.backward(x.astype(np.float64))
    assert_unchanged(bn, before)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((1, 3)), ValueError, "x: expected more than one value per channel"),
        (np.ones((0, 3)), ValueError, "x: expected more than one value per channel"),
        (np.ones((1, 3, 1, 1)), ValueError, "x: expected more than one value per channel"),
        (np.ones((6, 4)), ValueError, "x: expected 3 channels on axis 1, got shape (6, 4)"),
        (np.ones(3), ValueError, "x: expected 3 channels on axis 1, got shape (3,)"),
        (np.ones((6, 3), complex), TypeError, "x: expected float16, bfloat16, float32 or float64"),
        (np.ma.ones((6, 3)), TypeError, "x: expected an array without a mask"),
    ],
)
def test_a_bad_minibatch_is_refused_and_changes_nothing(x, error, message):
    bn = BatchNorm(3)
    bn(np.arange(18, dtype=np.float32).reshape(6, 3))
    before = snapshot(bn)
    with pytest.raises(error, match=re.escape(message)):
        bn(x)
    assert_unchanged(bn, before)
    assert bn.backward(np.ones((6, 3), np.float32)).shape == (6, 3)


class Negated:
    def forward(self, x):
        return -super().forward(x)


def test_a_forward_of_a_subclass_is_what_a_call_runs(rng):
    class Doubled(BatchNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    x = rng.standard_normal((5, 3))
    np.testing.assert_array_equal(Doubled(3)(x), 2 * BatchNorm(3)(x))

    class Mixed(Negated, BatchNorm):
        pass

    np.testing.assert_array_equal(Mixed(3)(x), -BatchNorm(3)(x))


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm])
def test_a_call_runs_the_forward_that_is_there(rng, layer):
    x = rng.standard_normal((5, 3, 4))
    norm = layer(3)
    wanted = norm.forward(x, residual=x)
    for y in (norm(x, residual=x), norm(x, x), norm(x=x, residual=x)):
        np.testing.assert_array_equal(y, wanted)
    with mock.patch.object(norm, "forward", return_value=7) as forward:
        assert norm(x, residual=None) == 7
    forward.assert_called_once_with(x, residual=None)
    with mock.patch.object(layer, "forward", autospec=True, side_effect=lambda self, x: self):
        assert norm(x) is norm
    norm.forward = lambda x: -x
    np.testing.assert_array_equal(norm(x), -x)
    del norm.forward
    np.testing.assert_array_equal(norm(x, x), wanted)


def test_layers_in_different_threads_do_not_disturb_each_other(rng):
    x = rng.standard_normal((8, 16, 20, 20)).astype(np.float32)
    alone = BatchNorm(16)
    for _ in range(20):
        alone.backward(alone(x))
    layers = [BatchNorm(16) for _ in range(4)]

    def train(bn):
        for _ in range(20):
            bn.backward(bn(x))

    threads = [threading.Thread(target=train, args=(bn,)) for bn in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for bn in layers:
        assert_unchanged(bn, snapshot(alone))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_activation_and_residual_go_through_both_modes(rng, training, activation):
    bn = BatchNorm(3, activation=activation, dtype=np.float64)
    bn(rng.standard_normal((16, 3, 4)))
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    bn.train(training)
    x, residual, dy = rng.standard_normal((3, 8, 3, 4))
    y = bn(x, residual=residual)
    dx, dresidual = bn.backward(dy)
    plain = BatchNorm(3, dtype=np.float64)
    plain.load_state_dict(bn.state_dict())
    a = plain.train(training)(x) + residual
    slope = np.where(a > 0, 1, reference.SLOPES[activation])
    assert_close(y, a * slope)
    assert_close(dresidual, dy * slope)
    assert_close(dx, plain.backward(dy * slope))
    for name in ("gamma", "beta"):
        assert_close(bn.grads[name], plain.grads[name])
    assert isinstance(bn.forward(x), np.ndarray)
    assert bn.backward(dy).shape == x.shape  # without a residual there is no pair


def test_a_mask_keeps_padding_out_of_the_running_statistics(rng):
    x, mask = rng.standard_normal((6, 9, 3)), rng.random((6, 9)) < 0.5
    bn, rows = BatchNorm(3, axis=-1), BatchNorm(3)
    y = bn(x, mask=mask)
    np.testing.assert_array_equal(y[mask], rows(x[mask]))
    assert not y[~mask].any()
    assert_unchanged(bn, snapshot(rows))
    dx = bn.backward(x)
    np.testing.assert_array_equal(dx[mask], rows.backward(x[mask]))
    y = bn.eval()(x, mask=mask)
    np.testing.assert_array_equal(y[mask], rows.eval()(x[mask]))
    assert not y[~mask].any()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_virtual_batches_pool_the_running_statistics_exactly(rng, size):
    bn, whole = BatchNorm(3, virtual_batch_size=size), BatchNorm(3)
    x = 1e3 + rng.standard_normal((8, 3, 5))
    y = bn(x)
    whole(x)
    wanted, _ = reference.batch_norm(x, bn.gamma, bn.beta, virtual_batch_size=size)
    assert_close(y, wanted, scale=1e3)  # the reference's mean has one rounding
    np.testing.assert_allclose(bn.running_mean, whole.running_mean, rtol=1e-15)
    np.testing.assert_allclose(bn.running_var, whole.running_var, rtol=1e-12)
    assert_close(bn.eval()(x), whole.eval()(x), scale=1e3)
    untracked = BatchNorm(3, virtual_batch_size=size, track_running_stats=False)
    np.testing.assert_array_equal(untracked.eval()(x), fastbn.batch_norm(x)[0])  # all together


def test_instance_norm_keeps_the_averages_of_its_examples(rng):
    norm = InstanceNorm(3, affine=True, track_running_stats=True, momentum=0.3)
    x, dy = 2 + rng.standard_normal((2, 5, 3, 6, 6))
    norm.gamma[:], norm.beta[:] = rng.standard_normal((2, 3))
    wanted, cache = reference.instance_norm(x, norm.gamma, norm.beta)
    assert_close(norm(x), wanted)
    for actual, right in zip(
        (norm.backward(dy), norm.grads["gamma"], norm.grads["beta"]),
        reference.instance_norm_backward(dy, cache),
        strict=True,
    ):
        assert_close(actual, right)
    np.testing.assert_allclose(norm.running_mean, 0.3 * x.mean((0, 2, 3)))
    variances = x.var((2, 3), ddof=1).mean(0)
    np.testing.assert_allclose(norm.running_var, 0.7 + 0.3 * variances)
    assert norm.num_batches_tracked == 1
    wanted = reference.batch_norm_inference(
        x, norm.running_mean, norm.running_var, norm.gamma, norm.beta
    )
    assert_close(norm.eval()(x), wanted)
    plain = InstanceNorm(3).eval()
    assert plain.state_dict() == {} == plain.params
    assert_close(plain(x), reference.instance_norm(x)[0])


def test_what_cannot_be_tracked_changes_nothing(rng):
    x = rng.standard_normal((4, 3, 5))
    for norm in (BatchNorm(3), InstanceNorm(3, track_running_stats=True)):
        norm.running_var = np.ones(4)
        with pytest.raises(ValueError, match="4"):
            norm(x)
        assert norm.num_batches_tracked == 0
        np.testing.assert_array_equal(norm.running_mean, 0)
        with pytest.raises(RuntimeError, match="no forward pass"):
            norm.backward(x)


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_read_only_running_statistics_are_refused_and_nothing_changes(rng, layer, name):
    x = rng.standard_normal((2, 4, 3, 5))
    norm = layer(3, track_running_stats=True, affine=True)
    norm(x[0])
    wanted = norm.backward(x[0])
    before = snapshot(norm)
    getattr(norm, name).flags.writeable = False
    with pytest.raises(ValueError, match=r"running.*: expected .*shape \(3,\)|contiguous"):
        norm(x[1])
    assert_unchanged(norm, before)
    np.testing.assert_array_equal(norm.backward(x[0]), wanted)
    getattr(norm, name).flags.writeable = True
    norm(x[1])
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchNorm(3, activation="tanh"), ValueError,
         "activation: expected None, 'relu' or 'leaky_relu', got 'tanh'"),
        (lambda: BatchNorm(3, virtual_batch_size=0), ValueError,
         "virtual_batch_size: expected an integer >= 1, got 0"),
        (lambda: BatchNorm(3, virtual_batch_size=2.5), TypeError,
         "virtual_batch_size: expected an integer, got float"),
        (lambda: BatchNorm(3, virtual_batch_size=4)(np.ones((9, 3))), ValueError,
         "x: expected more than one value per channel to take statistics of, got shape (9, 3), "
         "in groups of 4 examples"),
        (lambda: BatchNorm(3)(np.ones((9, 3)), mask=np.arange(9) == 1), ValueError,
         "x: expected more than one value per channel to take statistics of, got shape (9, 3), "
         "of which mask leaves 1"),
        (lambda: BatchNorm(3)(np.ones((9, 3)), mask=np.zeros(9, int)), TypeError,
         "mask: expected bool, got int64"),
        (lambda: BatchNorm(3)(np.ones((2, 3)), mask=[[True], [True, False]]), ValueError,
         "mask: expected an array_like of bool, got setting an array element"),
        (lambda: fastbn.batch_norm(np.ones((2, 3)), mask=[[True], [True, False]]), ValueError,
         "mask: expected an array_like of bool, got setting an array element"),
        (lambda: BatchNorm(3).fold_into([[1.0], [1.0, 2.0]]), ValueError,
         "weight: expected an array_like of numbers, got"),
        (lambda: BatchNorm(3).fold_into(np.ones((3, 2)), [[1.0], [1.0, 2.0]]), ValueError,
         "bias: expected an array_like of numbers, got"),
        (lambda: BatchNorm(3)(np.ones((9, 3)), residual=np.ones(3)), ValueError,
         "residual: expected shape (9, 3), as x has, got (3,)"),
        (lambda: InstanceNorm(3)(np.ones((9, 3))), ValueError,
         "x: expected more than one position per example and channel to take statistics of, "
         "got shape (9, 3)"),
        (lambda: InstanceNorm(3)(np.ones((9, 4, 2))), ValueError,
         "x: expected 3 channels on axis 1, got shape (9, 4, 2)"),
    ],
)  # fmt: skip
def test_more_that_is_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
