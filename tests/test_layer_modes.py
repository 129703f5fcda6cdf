"""Which statistics a layer uses, what it keeps for backward, and what is frozen."""

import copy
import pickle
import re
import weakref

import numpy as np
import pytest
from layer_cases import assert_unchanged, snapshot
from support import assert_close

import fastbn
from fastbn import BatchNorm, InstanceNorm, optim, reference


def trained(rng, layer=BatchNorm, **options):
    bn = layer(3, affine=True, track_running_stats=True, **options)
    bn(2 + 3 * rng.standard_normal((6, 3, 4)))
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    return bn


# ----------------------------------------------------------------------------------------- freeze


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_frozen_layer_trains_by_its_running_statistics_and_keeps_them(rng, layer, dtype):
    norm = trained(rng, layer, dtype=dtype)
    assert norm.freeze() is norm
    norm.eval()
    norm.train()  # this does not end it
    assert norm.frozen
    state = norm.state_dict()
    x, dy = rng.standard_normal((2, 5, 3, 4)).astype(dtype)
    mean, std = norm.running_mean[:, None], np.sqrt(norm.running_var[:, None] + 1e-5)
    z_hat = (x.astype(np.float64) - mean) / std
    assert_close(norm(x), norm.gamma[:, None] * z_hat + norm.beta[:, None], dtype)
    assert_close(norm.backward(dy), dy * norm.gamma[:, None] / std, dtype)
    assert_close(norm.grads["gamma"], (dy * z_hat).sum((0, 2)), dtype)
    assert_close(norm.grads["beta"], dy.astype(np.float64).sum((0, 2)), dtype)
    assert norm.num_batches_tracked == 1
    for name, values in norm.state_dict().items():
        np.testing.assert_array_equal(values, state[name])
    optim.SGD(norm, 0.1).step()
    assert (norm.gamma != state["weight"]).all()


def test_gradients_of_a_frozen_layer_are_those_of_finite_differences(rng):
    bn = trained(rng, dtype=np.float64).freeze()
    x, dy, residual = rng.standard_normal((3, 4, 3, 4))
    bn(x, residual)
    dx, _ = bn.backward(dy)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-3  # y is linear in x
        found = (dy * (bn(x + step, residual) - bn(x - step, residual))).sum() / 2e-3
        np.testing.assert_allclose(dx[i], found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_an_unfrozen_layer_is_as_it_was(rng, training):
    bn, plain = trained(rng).train(training), trained(rng).train(training)
    plain.load_state_dict(bn.state_dict())
    assert bn.freeze(affine=True).unfreeze() is bn
    x = rng.standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_array_equal(bn(x), plain(x))
    np.testing.assert_array_equal(bn.backward(x), plain.backward(x))
    assert_unchanged(bn, snapshot(plain))
    assert (bn.frozen, bn.frozen_params) == (False, ())
    assert repr(bn) == repr(plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda layers: optim.SGD(layers, 0.1, momentum=0.9, weight_decay=0.1),
        lambda layers: optim.Adam(layers, 0.1),
        lambda layers: optim.AdamW(layers, 0.1, decays=lambda *_: True),
    ],
)
@pytest.mark.parametrize("attached", [True, False])
def test_frozen_gamma_and_beta_stay_whatever_the_optimizer_remembers(rng, make, attached):
    bn, other = trained(rng), trained(rng)
    optimizer = make([bn, other])
    if attached:
        optimizer.attach()
    x = rng.standard_normal((5, 3)).astype(np.float32)

    def step():
        for norm in (bn, other):
            norm(x)
            norm.backward(x)
        if not attached:
            optimizer.step()

    step()
    bn.freeze(affine=True)
    before, remembered = bn.state_dict(), optimizer.state_dict()
    free = other.gamma.copy()
    step()
    for name, values in bn.state_dict().items():
        np.testing.assert_array_equal(values, before[name])
    assert not any(grad.any() for grad in bn.grads.values())
    for name, values in optimizer.state_dict().items():
        if name.startswith("0."):
            np.testing.assert_array_equal(values, remembered[name])
    assert (other.gamma != free).all()
    bn.freeze()  # the statistics alone
    step()
    assert (bn.gamma != before["weight"]).all()
    np.testing.assert_array_equal(bn.running_mean, before["running_mean"])


def test_a_clipped_norm_is_that_of_what_trains(rng):
    frozen, free = trained(rng).freeze(affine=True), trained(rng)
    optimizer = optim.SGD([frozen, free], 1.0)
    optimizer.register_step_pre_hook(optim.GradientClipping(1.0))
    x = 100 * rng.standard_normal((5, 3)).astype(np.float32)
    before = free.state_dict()
    for norm in (frozen, free):
        norm(x)
        norm.backward(x)
    optimizer.step()
    moved = np.concatenate([free.gamma - before["weight"], free.beta - before["bias"]])
    np.testing.assert_allclose(np.linalg.norm(moved), 1, rtol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_and_text_tell_that_a_layer_is_frozen(rng, affine, duplicate):
    bn = duplicate(trained(rng).freeze(affine=affine))
    assert repr(bn) == (
        "BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
        f"dtype=float32, activation=None, virtual_batch_size=None).freeze(affine={affine})"
    )
    before = bn.state_dict()
    bn(rng.standard_normal((6, 3)))
    np.testing.assert_array_equal(bn.running_mean, before["running_mean"])


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm])
def test_without_running_statistics_there_is_nothing_to_freeze(layer):
    norm = layer(3, track_running_stats=False)
    with pytest.raises(RuntimeError, match="freeze: expected running statistics, this layer was"):
        norm.freeze()
    assert not norm.frozen


def test_exact_statistics_leave_a_frozen_layer(rng):
    frozen, free = trained(rng).freeze(), trained(rng)
    before = snapshot(frozen)
    batches = 7 + rng.standard_normal((3, 6, 3))
    fastbn.update_statistics([frozen, free], batches)
    assert_unchanged(frozen, before)
    seen = reference.batch_norm_inference(
        np.concatenate(batches), frozen.running_mean, frozen.running_var, frozen.gamma, frozen.beta
    )
    np.testing.assert_allclose(free.running_mean, seen.mean(0), rtol=1e-12)
    with pytest.raises(ValueError, match="got none that is not frozen"):
        fastbn.update_statistics([frozen], batches)


# -------------------------------------------------------------------------------- what is kept


def keeps_nothing(norm, **arguments):
    """Return whether nothing holds x after a forward pass."""
    x = np.ones((4, 3, 5))
    held = weakref.ref(x)
    norm(x, **arguments)
    del x
    return held() is None


NORMS = [
    lambda: BatchNorm(3, activation="relu"),
    lambda: BatchNorm(3, track_running_stats=False),
    lambda: BatchNorm(3, renorm=(3, 5), activation="leaky_relu"),
    lambda: BatchNorm(3, virtual_batch_size=2),
    lambda: InstanceNorm(3, activation="relu"),
    lambda: InstanceNorm(3, track_running_stats=True),
]


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("residual", [True, False])
def test_for_serving_nothing_of_x_is_kept(rng, make, residual):
    norm, plain = make(), make()
    x = rng.standard_normal((4, 3, 5))
    arguments = {"residual": x.copy()} if residual else {}
    held = weakref.ref(x)
    norm(x, **arguments)
    plain(x, **arguments)
    assert held() is x
    assert norm.eval(backward=False) is norm
    wanted = plain.eval()(x, **arguments)
    np.testing.assert_array_equal(norm(x, **arguments), wanted)
    plain.train()(np.zeros((4, 3, 5)))
    del x
    assert held() is None  # that of training went as well
    assert keeps_nothing(norm, **arguments)
    message = "backward: there was no forward pass to go back through, .* eval.backward=False"
    with pytest.raises(RuntimeError, match=message):
        norm.backward(wanted)


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("back", [lambda norm: norm.train(), lambda norm: norm.eval()])
def test_a_gradient_is_possible_in_both_modes_again(rng, make, back):
    norm, plain = make(), make()
    x, dy = rng.standard_normal((2, 4, 3, 5))
    back(plain)(x)
    back(norm.eval(backward=False))(x)
    np.testing.assert_array_equal(norm.backward(dy), plain.backward(dy))


def test_a_mask_changes_nothing_about_it(rng):
    norm = BatchNorm(3).eval(backward=False)
    mask = rng.random((4, 5)) < 0.5
    assert keeps_nothing(norm, mask=mask)


def test_exact_statistics_leave_a_layer_that_serves(rng):
    bn = BatchNorm(3).eval(backward=False)
    fastbn.update_statistics([bn], [rng.standard_normal((6, 3))])
    assert not bn.training
    assert keeps_nothing(bn)
    bn.training = True  # as PyTorch's code does by hand
    x = rng.standard_normal((4, 3))
    bn(x)
    assert bn.backward(x).shape == x.shape


# ----------------------------------------------------------------------- attributes, and gradients


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("momentum", 5, ValueError, "momentum: expected None or a number from 0 to 1, got 5"),
        ("momentum", "0.1", TypeError, "momentum: expected a number, got str"),
        ("eps", -1, ValueError, "eps: expected a finite number >= 0, got -1"),
        ("axis", 1.5, TypeError, "axis: expected an integer, got float"),
        ("num_features", 0, ValueError, "num_features: expected an integer >= 1, got 0"),
        ("dtype", "f2", TypeError, "dtype: expected float32 or float64, got float16"),
        ("activation", "tanh", ValueError, "activation: expected None, 'relu' or 'leaky_relu'"),
        ("virtual_batch_size", 0, ValueError, "virtual_batch_size: expected an integer >= 1"),
        ("renorm", (0, 0), ValueError, "renorm: expected None or two numbers, r_max >= 1"),
    ],
)
def test_attributes_are_checked_like_arguments(rng, name, value, error, message):
    bn = trained(rng)
    before, kept = snapshot(bn), getattr(bn, name)
    with pytest.raises(error, match=re.escape(message)):
        setattr(bn, name, value)
    assert getattr(bn, name) == kept
    bn.eval()(rng.standard_normal((4, 3)))
    assert_unchanged(bn, before)


def test_attributes_that_are_right_count_from_the_next_call(rng):
    bn = BatchNorm(3)
    x = rng.standard_normal((6, 3, 4))
    bn.momentum, bn.eps, bn.activation, bn.virtual_batch_size = 1, np.float32(0.5), "relu", 2
    assert type(bn.momentum) is type(bn.eps) is float
    wanted, cache = fastbn.batch_norm(x, eps=0.5, activation="relu", virtual_batch_size=2)
    np.testing.assert_array_equal(bn(x), wanted)
    np.testing.assert_array_equal(bn.running_mean, cache.moments.mean)
    bn.momentum = None
    bn(x)
    np.testing.assert_allclose(bn.running_mean, cache.moments.mean, rtol=1e-14)
    bn.axis = -1
    with pytest.raises(ValueError, match="x: expected 3 channels on axis -1"):
        bn(x)


@pytest.mark.parametrize("missing", [lambda grads: grads.pop("gamma"), dict.clear])
def test_a_gradient_that_is_missing_is_made(rng, missing):
    bn, plain = BatchNorm(3), BatchNorm(3)
    x = rng.standard_normal((6, 3))
    missing(bn.grads)
    bn.grads["beta"] = None
    for norm in (bn, plain):
        norm(x)
        norm.backward(x)
    assert bn.grads.keys() == plain.grads.keys()
    for name, grad in plain.grads.items():
        np.testing.assert_array_equal(bn.grads[name], grad)
        assert bn.grads[name].dtype == np.float32
    optim.SGD(bn, 0.1).step()


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize(
    "bad", [[0.0] * 3, np.zeros(4), np.zeros(3, int), np.broadcast_to(np.float32(0), 3)]
)
def test_a_gradient_that_cannot_be_written_is_refused_and_nothing_changes(rng, name, bad):
    bn = BatchNorm(3)
    x = rng.standard_normal((6, 3))
    bn(x)
    bn.backward(x)
    bn.register_grad_hook(lambda layer: pytest.fail("a hook ran after an error"))
    bn.grads[name] = bad
    (other,) = bn.grads.keys() - {name}
    kept = bn.grads[other].copy()
    words = f"grads['{name}']: expected the layer to have a writeable array of floats of shape (3,)"
    with pytest.raises(ValueError, match=re.escape(words)):
        bn.backward(2 * x)
    np.testing.assert_array_equal(bn.grads[other], kept)
    assert bn.grads[name] is bad
