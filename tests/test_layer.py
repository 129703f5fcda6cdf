"""The layer: modes, running statistics, gradients, hooks, state, and what it refuses."""

import copy
import pickle
import re
import threading

import numpy as np
import pytest
from support import assert_close

import fastbn
from fastbn import BatchNorm, InstanceNorm, reference


def snapshot(bn):
    return {**bn.state_dict(), **{f"grad of {name}": g.copy() for name, g in bn.grads.items()}}


def assert_unchanged(bn, before):
    after = snapshot(bn)
    assert after.keys() == before.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features: expected an integer >= 1, got 0"),
        ({"num_features": 2.5}, TypeError, "num_features: expected an integer, got float"),
        ({"axis": "1"}, TypeError, "axis: expected an integer, got str"),
        ({"eps": -1}, ValueError, "eps: expected a finite number >= 0, got -1"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0, got nan"),
        ({"eps": "a"}, TypeError, "eps: expected a number, got str"),
        ({"momentum": 1.5}, ValueError, "momentum: expected None or a number from 0 to 1, got 1.5"),
        ({"momentum": -0.1}, ValueError, "momentum: expected None or a number from 0 to 1"),
        ({"momentum": "0.1"}, TypeError, "momentum: expected a number, got str"),
        ({"momentum": "a"}, TypeError, "momentum: expected a number, got str"),
        ({"dtype": np.float16}, TypeError, "dtype: expected float32 or float64, got float16"),
        ({"dtype": ">f4"}, TypeError, "dtype: expected float32 or float64, got >f4"),
        ({"dtype": "x"}, TypeError, "dtype: expected float32 or float64, got 'x'"),
        ({"dtype": None}, TypeError, "dtype: expected float32 or float64, got None"),
        ({"momentum": 10**400}, ValueError, "momentum: expected a finite number, got one beyond"),
    ],
)
def test_bad_constructor_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BatchNorm(**{"num_features": 3, **arguments})


def trained(rng, **options):
    bn = BatchNorm(3, **options)
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    bn(rng.standard_normal((6, 3)))
    return bn


def test_state_dict_goes_round(rng):
    bn = trained(rng)
    state = bn.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"] == 1
    other = BatchNorm(3)
    arrays = dict(other.params)
    other.load_state_dict(state)
    assert all(other.params[name] is array for name, array in arrays.items())
    assert_unchanged(other, snapshot(bn))
    state["weight"][:] = 9
    state["running_mean"][:] = 9
    assert not (bn.gamma == 9).any()
    assert not (other.running_mean == 9).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, "missing: weight, unknown: none"),
        ({"gamma": np.ones(3)}, ValueError, "missing: none, unknown: gamma"),
        ({"bias": np.ones(4)}, ValueError, "bias: expected shape (3,), got (4,)"),
        ({"bias": ["a", "b", "c"]}, TypeError, "bias: expected numbers, got dtype <U1"),
        ({"bias": [[1], [1, 2]]}, ValueError, "bias: expected an array_like of numbers, got"),
        ({"running_var": np.ones((3, 1))}, ValueError, "running_var: expected shape (3,), got"),
        ({"running_var": [1, -1, 1]}, ValueError, "running_var: expected values >= 0, got -1"),
        (
            {"num_batches_tracked": 1.5},
            ValueError,
            "num_batches_tracked: expected one integer >= 0",
        ),
        ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked: expected one integer >= 0"),
        (
            {"num_batches_tracked": [1]},
            ValueError,
            "num_batches_tracked: expected one integer >= 0",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(rng, change, error, message):
    state = {**trained(rng).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    bn = trained(rng)
    before = snapshot(bn)
    with pytest.raises(error, match=re.escape(message)):
        bn.load_state_dict(state)
    assert_unchanged(bn, before)


def frozen(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("spoil", [lambda a: a[:, None], frozen, np.ndarray.tolist, np.int64])
def test_a_layer_whose_arrays_cannot_take_a_state_is_left_whole(rng, spoil):
    bn = trained(rng)
    bn.params["beta"] = spoil(np.arange(3.0))
    before = snapshot(bn)
    state = {**trained(rng).state_dict(), "num_batches_tracked": 7}
    message = "bias: expected the layer to have a writeable array of floats of shape (3,), got "
    with pytest.raises(ValueError, match=re.escape(message)):
        bn.load_state_dict(state)
    assert_unchanged(bn, before)


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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_have_the_state_but_neither_hooks_nor_minibatch(rng, duplicate):
    bn = trained(rng, momentum=None, eps=1e-3)
    bn.register_grad_hook(lambda layer: None)
    bn.eval()
    twin = duplicate(bn)
    assert repr(twin) == repr(bn)
    assert not twin.training
    assert_unchanged(twin, snapshot(bn))
    with pytest.raises(RuntimeError, match="no forward pass"):
        twin.backward(np.ones((6, 3)))
    twin.gamma[:] = 9
    assert not (bn.gamma == 9).any()
    twin.train()(rng.standard_normal((6, 3)))
    assert (twin.num_batches_tracked, bn.num_batches_tracked) == (2, 1)


def test_a_state_may_come_from_the_layer_itself(rng):
    bn = trained(rng)
    gamma, beta = bn.gamma.copy(), bn.beta.copy()
    bn.load_state_dict({**bn.state_dict(), "weight": bn.beta, "bias": bn.gamma})
    np.testing.assert_array_equal(bn.gamma, beta)
    np.testing.assert_array_equal(bn.beta, gamma)


def test_repr_tells_how_to_make_the_layer():
    bn = BatchNorm(3, axis=-1, momentum=None, dtype=np.float64, virtual_batch_size=4)
    assert repr(bn) == (
        "BatchNorm(3, axis=-1, eps=1e-05, momentum=None, affine=True, "
        "track_running_stats=True, dtype=float64, activation=None, virtual_batch_size=4)"
    )
    assert repr(InstanceNorm(3, activation="relu")) == (
        "InstanceNorm(3, axis=1, eps=1e-05, momentum=0.1, affine=False, "
        "track_running_stats=False, dtype=float32, activation='relu')"
    )


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
