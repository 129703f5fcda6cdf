"""Weight decay, gradient clipping, hooks and `attach`."""

from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
from optim_cases import FakeLayer, assert_same, layer_of, padded, snapshot, variants

from fastbn import optim
from fastbn.hooks import HookList
from fastbn.optim import updates

# Weight decay.


@pytest.mark.parametrize(
    ("name", "decays"),
    [(n, False) for n in ("gamma", "beta", "b", "bias", "b1", "gamma12", "beta3", "bias0")]
    + [(n, True) for n in ("W", "W1", "b_W", "embed", "gammas", "weight", "kernel", "xb", "B")],
)
def test_decays_by_name(name, decays):
    assert optim.decays_by_name(name, np.zeros((1, 4))) is decays


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop, optim.Adam, optim.AdamW])
def test_weight_decay_passes_over_shifts_scales_and_biases(cls):
    arrays = {name: np.ones((3, 1)) for name in ("W1", "b1", "gamma", "beta")}
    decayed = layer_of(**{name: a.copy() for name, a in arrays.items()})
    plain = layer_of(**{name: a.copy() for name, a in arrays.items()})
    for layer, rate in ((decayed, 0.5), (plain, 0.0)):
        for g in layer.grads.values():
            g[...] = -0.25  # the decay turns it round
        cls(layer, lr=0.1, weight_decay=rate).step()
    differ = [n for n in arrays if (decayed.params[n] != plain.params[n]).any()]
    assert differ == ["W1"]


def test_decays_is_asked_once_with_name_and_array():
    asked = []
    layer = layer_of(W=np.ones(2), b=np.ones(2))

    def only_b(name, array):
        asked.append((name, array))
        return name == "b"

    optim.SGD(layer, lr=1.0, weight_decay=0.5, decays=only_b).step()
    assert [name for name, _ in asked] == ["W", "b"]
    assert asked[0][1] is layer.params["W"]
    np.testing.assert_array_equal(layer.params["W"], 0)
    np.testing.assert_array_equal(layer.params["b"], -0.5)


def test_weight_decay_hook_is_the_same_as_the_argument():
    first, second = FakeLayer(), FakeLayer()
    hooked = optim.Adam(first, lr=0.01)
    hooked.register_step_pre_hook(optim.WeightDecay(0.1))
    built_in = optim.Adam(second, lr=0.01, weight_decay=0.1)
    for t in range(5):
        for layer, opt in ((first, hooked), (second, built_in)):
            layer.backward(t)
            opt.step()
    assert_same(list(first.params.values()), list(second.params.values()))


def test_weight_decay_hook_can_be_told_what_decays():
    layer = layer_of(W=np.full(2, 2.0), b=np.full(2, 2.0))
    opt = optim.SGD(layer, lr=1.0)
    opt.register_step_pre_hook(optim.WeightDecay(0.5, decays=lambda name, _: name == "b"))
    opt.step()
    np.testing.assert_array_equal(layer.grads["W"], 1)
    np.testing.assert_array_equal(layer.grads["b"], 2)


# Gradient clipping.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clipping_scales_to_the_norm_over_all_layers(dtype):
    layers = [layer_of(W=np.zeros((2, 2), dtype)), layer_of(W=np.zeros(5, dtype))]
    layers[0].grads["W"][...] = [[3, 0], [0, 0]]
    layers[1].grads["W"][...] = [0, 0, 0, 0, 4]
    opt = optim.SGD(layers, lr=1.0)
    opt.register_step_pre_hook(optim.GradientClipping(2.5))
    arrays = [layer.grads["W"] for layer in layers]
    opt.step()
    assert all(layer.grads["W"] is a for layer, a in zip(layers, arrays, strict=True))
    np.testing.assert_array_equal(arrays[0], [[1.5, 0], [0, 0]])
    np.testing.assert_array_equal(arrays[1], [0, 0, 0, 0, 2])
    np.testing.assert_array_equal(layers[1].params["W"], [0, 0, 0, 0, -2])


def test_clipping_leaves_smaller_gradients_alone():
    layer = FakeLayer()
    layer.backward()
    before = snapshot(layer)[2:]
    opt = optim.SGD(layer, lr=0.0)
    opt.register_step_pre_hook(optim.GradientClipping(1e3))
    opt.step()
    assert_same(snapshot(layer)[2:], before)


def test_clipping_sums_in_float64():
    layer = layer_of(W=np.zeros(3, np.float32))
    layer.grads["W"][...] = 1e25  # its square is Inf in float32
    opt = optim.SGD(layer, lr=1.0)
    opt.register_step_pre_hook(optim.GradientClipping(1.0))
    opt.step()
    np.testing.assert_allclose(layer.grads["W"], 1 / np.sqrt(3), rtol=1e-6)


def test_clipping_works_on_strided_gradients():
    layer = layer_of(W=np.zeros((4, 3), np.float32))
    layer.grads["W"] = padded(np.full((4, 3), 2.0, np.float32))
    opt = optim.SGD(layer, lr=1.0)
    opt.register_step_pre_hook(optim.GradientClipping(1.0))
    opt.step()
    np.testing.assert_allclose(np.linalg.norm(layer.grads["W"]), 1, rtol=1e-6)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_clipping_refuses_a_norm_that_is_not_finite_before_anything_changes(bad):
    layers = [FakeLayer(0), FakeLayer(1)]
    for layer in layers:
        layer.backward()
    layers[1].grads["W"][2, 1] = bad
    before = snapshot(*layers)
    opt = optim.Adam(layers)
    opt.register_step_pre_hook(optim.GradientClipping(0.1))
    with pytest.raises(
        FloatingPointError,
        match=r"grads: expected gradients of a finite norm, got (nan|inf)",
    ):
        opt.step()
    assert_same(snapshot(*layers), before)
    assert opt.stepping == ()
    assert opt.state_dict()["0.W.step"] == 0
    layers[1].grads["W"][2, 1] = 0
    opt.step()


def test_clipping_under_attach_takes_one_layer_at_a_time():
    layers = [layer_of(W=np.zeros(1)), layer_of(W=np.zeros(1))]
    for layer in layers:
        layer.hooks = HookList()
        layer.register_grad_hook = layer.hooks.register
        layer.grads["W"][...] = 3
    opt = optim.SGD(layers, lr=1.0)
    opt.register_step_pre_hook(optim.GradientClipping(2.0))
    opt.attach()
    for layer in layers:
        layer.hooks.run(layer)
    assert [layer.params["W"].item() for layer in layers] == [-2, -2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sum_of_squares_is_exact_in_effect_for_every_length(dtype):
    rng = np.random.default_rng(5)
    for n in range(40):
        g = rng.standard_normal(n).astype(dtype)
        expected = float(sum(Fraction(float(each)) ** 2 for each in g))
        assert updates.sum_of_squares(g) == pytest.approx(expected, rel=1e-14, abs=0)


# Hooks and attach.


def test_hooks_run_around_the_update_in_order_and_see_what_is_updated():
    layers = [layer_of(W=np.zeros(1)), layer_of(W=np.zeros(1))]
    opt = optim.SGD(layers, lr=1.0)
    both, seen = tuple(layers), []

    def hook(name):
        def note(given):
            assert given is opt
            seen.append((name, layers[0].params["W"].item(), opt.stepping))

        return note

    handles = [
        opt.register_step_post_hook(hook("post 1")),
        opt.register_step_pre_hook(hook("pre 1")),
        opt.register_step_pre_hook(hook("pre 2")),
        opt.register_step_post_hook(hook("post 2")),
    ]
    assert opt.stepping == ()
    opt.step()
    assert seen == [
        ("pre 1", 0, both), ("pre 2", 0, both), ("post 1", -1, both), ("post 2", -1, both)
    ]  # fmt: skip
    assert opt.stepping == ()
    for handle in handles:
        handle.remove()
        handle.remove()
    opt.step()
    assert len(seen) == 4


def test_a_pre_hook_may_set_the_learning_rate_and_replace_gradients():
    layer = layer_of(W=np.zeros(2))
    opt = optim.SGD(layer, lr=1.0)

    def hook(given):
        given.lr = 0.5
        layer.grads["W"] = np.full(2, 4.0)

    opt.register_step_pre_hook(hook)
    opt.step()
    np.testing.assert_array_equal(layer.params["W"], -2)


def test_what_a_pre_hook_breaks_is_refused():
    layer = layer_of(W=np.zeros(2))
    opt = optim.SGD(layer, lr=1.0)
    opt.register_step_pre_hook(lambda _: layer.grads.clear())
    with pytest.raises(TypeError, match=r"grads\['W'\]: expected ndarray of .*, got NoneType"):
        opt.step()
    np.testing.assert_array_equal(layer.params["W"], 0)
    assert opt.stepping == ()


def test_a_step_inside_a_step_is_refused():
    opt = optim.SGD(layer_of(W=np.zeros(2)), lr=1.0)
    opt.register_step_post_hook(lambda given: given.step())
    with pytest.raises(RuntimeError, match="step: called from inside a step, by a hook"):
        opt.step()
    assert opt.stepping == ()


@variants
def test_attach_updates_as_step_does_to_the_bit(cls, options):
    stepped, attached = ([FakeLayer(seed) for seed in range(3)] for _ in range(2))
    first, second = cls(stepped, **options), cls(attached, **options)
    seen = []
    second.register_step_pre_hook(lambda opt: seen.append(opt.stepping))
    handle = second.attach()
    for t in range(5):
        for layer in reversed(stepped):
            layer.backward(t)
        first.step()
        for layer in reversed(attached):
            layer.backward(t)
    assert_same(snapshot(*stepped), snapshot(*attached))
    assert seen == [(layer,) for layer in reversed(attached)] * 5
    assert second.stepping == ()
    # Detached, the optimizer goes on by steps.
    handle.remove()
    handle.remove()
    for layer in (*stepped, *attached):
        layer.backward(5)
    assert len(seen) == 15
    first.step()
    second.step()
    assert_same(snapshot(*stepped), snapshot(*attached))


def test_attached_optimizers_refuse_step_and_a_second_attach():
    layer = FakeLayer()
    opt = optim.SGD(layer, lr=0.1)
    handle = opt.attach()
    before = snapshot(layer)
    with pytest.raises(
        RuntimeError, match="step: expected no attached optimizer, it would update twice"
    ):
        opt.step()
    with pytest.raises(RuntimeError, match="attach: this optimizer is attached already"):
        opt.attach()
    assert_same(snapshot(layer), before)
    assert len(layer.hooks) == 1
    handle.remove()
    assert len(layer.hooks) == 0
    opt.attach()
    assert len(layer.hooks) == 1


def test_attach_names_the_layer_that_cannot_and_attaches_none():
    layers = [FakeLayer(), layer_of(W=np.zeros(1))]
    opt = optim.SGD(layers, lr=0.1)
    message = r"layers\[1\]: expected register_grad_hook, got SimpleNamespace"
    with pytest.raises(TypeError, match=message):
        opt.attach()
    assert len(layers[0].hooks) == 0
    opt.step()


def test_attach_passes_over_layers_without_parameters():
    layers = [FakeLayer(), layer_of()]
    optim.SGD(layers, lr=0.1).attach()
    assert len(layers[0].hooks) == 1


def test_attach_undoes_what_it_did_when_a_layer_refuses():
    def refuse(_hook):
        raise RuntimeError("full")

    layers = [FakeLayer(0), FakeLayer(1)]
    layers[1].register_grad_hook = refuse
    opt = optim.SGD(layers, lr=0.1)
    with pytest.raises(RuntimeError, match="full"):
        opt.attach()
    assert len(layers[0].hooks) == 0
    opt.step()
