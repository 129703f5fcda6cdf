import copy
import inspect
import pickle
import re
from math import cos, inf, nan, pi
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbn import _updates, optim
from fastbn._hooks import HookList


class FakeLayer:
    """A layer with W and gamma, whose backward makes gradients from the parameters."""

    def __init__(self, seed=0, dtype=np.float32, shape=(5, 3)):
        rng = np.random.default_rng(seed)
        self.params = {
            "W": rng.standard_normal(shape).astype(dtype),
            "gamma": rng.standard_normal(7).astype(dtype),
        }
        self.grads = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.hooks = HookList()

    def register_grad_hook(self, hook):
        return self.hooks.register(hook)

    def backward(self, t=0):
        for name, p in self.params.items():
            # np.arange keeps the elements apart from each other.
            noise = np.cos(np.arange(p.size).reshape(p.shape) + t).astype(p.dtype)
            self.grads[name][...] = p - noise
        self.hooks.run(self)


def layer_of(**arrays):
    """A layer with the given parameters, and gradients of ones."""
    return SimpleNamespace(
        params=arrays, grads={name: np.ones_like(array) for name, array in arrays.items()}
    )


def snapshot(*layers):
    return [a.copy() for layer in layers for a in (*layer.params.values(), *layer.grads.values())]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


# How to make each optimizer, here and in torch.
VARIANTS = {
    "sgd": (optim.SGD, {"lr": 0.05}),
    "sgd decay": (optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "momentum decay": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "nesterov decay": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
    "rmsprop decay": (optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    "rmsprop momentum": (optim.RMSprop, {"lr": 0.01, "momentum": 0.8}),
    "rmsprop momentum decay": (optim.RMSprop, {"momentum": 0.8, "weight_decay": 0.1}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam decay": (
        optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    ),
    "adam no memory": (optim.Adam, {"lr": 0.01, "betas": (0.0, 0.0)}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw default": (optim.AdamW, {}),
}
variants = pytest.mark.parametrize(("cls", "options"), list(VARIANTS.values()), ids=list(VARIANTS))


def everything_decays(_name, _array):
    return True


# The same recurrences, written from the papers in float64.


class Recurrence:
    def __init__(self, cls, options, p):
        signature = inspect.signature(cls)
        self.o = {
            name: options.get(name, parameter.default)
            for name, parameter in signature.parameters.items()
        }
        self.cls, self.p, self.t = cls, p.astype(np.float64), 0
        self.m = self.v = self.u = 0.0

    def step(self, g):
        o, self.t = self.o, self.t + 1
        if self.cls is optim.AdamW:
            self.p = self.p - o["lr"] * o["weight_decay"] * self.p
        else:
            g = g + o["weight_decay"] * self.p
        if self.cls is optim.SGD:
            self.u = g if self.t == 1 else o["momentum"] * self.u + g
            move = g + o["momentum"] * self.u if o["nesterov"] else self.u
        elif self.cls is optim.RMSprop:
            self.v = o["alpha"] * self.v + (1 - o["alpha"]) * g**2
            move = self.u = o["momentum"] * self.u + g / (np.sqrt(self.v) + o["eps"])
        else:
            b1, b2 = o["betas"]
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g**2
            m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
            move = m_hat / (np.sqrt(v_hat) + o["eps"])
        self.p = self.p - o["lr"] * move


@variants
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 3e-5), (np.float64, 1e-12)])
def test_agrees_with_the_recurrence_in_float64(cls, options, dtype, rtol):
    rng = np.random.default_rng(1)
    layer = layer_of(W=rng.standard_normal((9, 11)).astype(dtype))
    expected = Recurrence(cls, options, layer.params["W"])
    opt = cls(layer, **options)
    for _ in range(50):
        g = rng.standard_normal((9, 11)).astype(dtype)
        layer.grads["W"][...] = g
        opt.step()
        expected.step(g.astype(np.float64))
    np.testing.assert_allclose(layer.params["W"], expected.p, rtol=rtol, atol=rtol)


@variants
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-5), (np.float64, 1e-12)])
def test_agrees_with_torch(cls, options, dtype, rtol):
    torch = pytest.importorskip("torch")
    layer = FakeLayer(dtype=dtype)
    theirs = {name: torch.tensor(p, requires_grad=True) for name, p in layer.params.items()}
    ours = cls(layer, **options, decays=everything_decays)
    other = getattr(torch.optim, cls.__name__)(list(theirs.values()), **options)
    for t in range(50):
        # Both get the gradients of their own parameters, so that errors would feed back.
        layer.backward(t)
        mine = FakeLayer(dtype=dtype)
        mine.params = {name: p.detach().numpy() for name, p in theirs.items()}
        mine.backward(t)
        for name, p in theirs.items():
            p.grad = torch.tensor(mine.grads[name])
        ours.step()
        other.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(layer.params[name], p.detach().numpy(), rtol=rtol, atol=rtol)


@variants
def test_defaults_are_those_of_torch(cls, options):
    torch = pytest.importorskip("torch")
    theirs = inspect.signature(getattr(torch.optim, cls.__name__)).parameters
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in theirs and name != "lr":
            assert parameter.default == theirs[name].default, name
    assert "lr" in options or cls is not optim.SGD


@variants
def test_converges_on_a_quadratic(cls, options):
    layer = layer_of(W=np.full(4, 3.0, np.float32))
    opt = cls(layer, **{**options, "weight_decay": 0.0})
    for epoch in range(1500):
        opt.lr = optim.cosine_decay(0.05, epoch, epochs=1500)
        layer.grads["W"][...] = 2 * (layer.params["W"] - 1)
        opt.step()
    np.testing.assert_allclose(layer.params["W"], 1, atol=1e-2)


# Memory: order, strides, alignment.


def padded(a):
    big = np.zeros(tuple(2 * n + 1 for n in a.shape), a.dtype)
    view = big[..., *(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def misaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


LAYOUTS = {
    "C": lambda a: np.array(a, order="C"),
    "F": lambda a: np.array(a, order="F"),
    "padded": padded,
    "backwards": lambda a: a[::-1].copy()[::-1] if a.ndim else a,
    "turned": lambda a: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0) if a.ndim else a,
    "misaligned": misaligned,
    "memmap class": lambda a: np.array(a, order="C").view(np.memmap),
}


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    variant=st.sampled_from(sorted(VARIANTS)),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_layout_changes_no_bit(shape, layouts, variant, dtype):
    cls, options = VARIANTS[variant]
    rng = np.random.default_rng(2)
    start = rng.standard_normal(shape).astype(dtype)
    plain, other = layer_of(W=start.copy()), layer_of(W=LAYOUTS[layouts[0]](start.copy()))
    array = other.params["W"]
    pair = cls(plain, **options), cls(other, **options)
    for turn in range(4):
        g = np.asarray(rng.standard_normal(shape)).astype(dtype)
        plain.grads["W"], other.grads["W"] = g, LAYOUTS[layouts[1]](g)
        if turn == 2:  # another array of the same shape takes the place of the first
            array = other.params["W"] = LAYOUTS[layouts[2]](array)
        for opt in pair:
            opt.step()
        assert other.params["W"] is array
        np.testing.assert_array_equal(array, plain.params["W"])
        np.testing.assert_array_equal(other.grads["W"], g)
    first, second = (opt.state_dict() for opt in pair)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    pair[1].load_state_dict(first)
    for key, value in pair[1].state_dict().items():
        np.testing.assert_array_equal(value, first[key])


def test_nothing_beside_a_strided_parameter_is_written():
    big = np.arange(24.0).reshape(4, 6)
    before = big.copy()
    layer = layer_of(W=big[:, ::2])
    optim.SGD(layer, lr=1.0).step()
    np.testing.assert_array_equal(big[:, 1::2], before[:, 1::2])
    np.testing.assert_array_equal(big[:, ::2], before[:, ::2] - 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@variants
def test_an_element_does_not_depend_on_length_or_alignment(cls, options, dtype):
    rng = np.random.default_rng(3)
    p, g = rng.standard_normal((2, 67)).astype(dtype)
    whole = layer_of(W=p.copy())
    whole.grads["W"] = g
    parts = [layer_of(W=np.concatenate([np.zeros(3, dtype), p[i:]])[3:]) for i in range(67)]
    for i, part in enumerate(parts):
        part.grads["W"] = g[i:]
    opts = [cls(layer, **options) for layer in (whole, *parts)]
    for _ in range(3):
        for opt in opts:
            opt.step()
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part.params["W"], whole.params["W"][i:])


@pytest.mark.parametrize(
    ("of_params", "of_grads"), [(np.float32, np.float64), (np.float64, np.float32)]
)
def test_gradients_of_the_other_precision_are_converted(of_params, of_grads):
    rng = np.random.default_rng(4)
    p, g = rng.standard_normal((2, 40))
    p, g = p.astype(of_params), g.astype(of_grads)
    mixed, plain = layer_of(W=p.copy()), layer_of(W=p.copy())
    mixed.grads["W"], plain.grads["W"] = g, g.astype(of_params)
    for layer in (mixed, plain):
        optim.Adam(layer).step()
    assert_same([mixed.params["W"]], [plain.params["W"]])
    assert mixed.params["W"].dtype == of_params


def test_a_gradient_beyond_float32_becomes_inf_without_a_warning():
    layer = layer_of(W=np.zeros(2, np.float32))
    layer.grads["W"] = np.array([1e300, 1.0])
    optim.SGD(layer, lr=1.0).step()
    np.testing.assert_array_equal(layer.params["W"], [-inf, -1])


def test_nan_stays_in_its_element():
    layer = layer_of(W=np.zeros(33, np.float32))
    layer.grads["W"][7] = nan
    optim.Adam(layer).step()
    assert np.flatnonzero(np.isnan(layer.params["W"])).tolist() == [7]


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
        expected = float(np.sum(g.astype(np.longdouble) ** 2))
        assert _updates.sum_of_squares(g) == pytest.approx(expected, rel=1e-14, abs=0)


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


# Saved state.


@variants
@pytest.mark.parametrize("by_file", [False, True])
def test_training_resumes_to_the_same_bits(cls, options, by_file, tmp_path):
    layers = [FakeLayer(0), FakeLayer(1, shape=(4, 2, 3))]
    opt = cls(layers, **options)

    def train(layers, opt, epochs):
        for t in epochs:
            opt.lr = optim.exponential_decay(0.01, t)
            for layer in layers:
                layer.backward(t)
            opt.step()

    train(layers, opt, range(4))
    later, state = copy.deepcopy(layers), opt.state_dict()
    if by_file:
        np.savez(tmp_path / "state.npz", **state)
    train(layers, opt, range(4, 8))
    resumed = cls(later, **{**options, "lr": 0.7})
    if by_file:
        with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
            resumed.load_state_dict(state)
    else:
        resumed.load_state_dict(state)
    train(later, resumed, range(4, 8))
    assert_same(snapshot(*layers), snapshot(*later))
    first, second = opt.state_dict(), resumed.state_dict()
    assert list(first) == list(second)
    assert_same([np.asarray(v) for v in first.values()], [np.asarray(v) for v in second.values()])


def test_the_state_is_flat_and_a_copy():
    layer = FakeLayer()
    layer.backward()
    opt = optim.Adam(layer)
    opt.step()
    state = opt.state_dict()
    assert list(state) == [
        "lr", "weight_decay", "betas", "eps",
        "0.W.step", "0.W.m", "0.W.v", "0.gamma.step", "0.gamma.m", "0.gamma.v",
    ]  # fmt: skip
    assert state["0.W.m"].shape == (5, 3)
    assert state["0.W.m"].dtype == np.float32
    assert state["0.W.step"] == 1
    state["0.W.m"][...] = 99
    assert not (opt.state_dict()["0.W.m"] == 99).any()
    loaded = opt.state_dict()
    opt.load_state_dict(loaded)
    loaded["0.W.m"][...] = 99
    assert not (opt.state_dict()["0.W.m"] == 99).any()


@pytest.mark.parametrize(
    ("cls", "options", "buffers"),
    [
        (optim.SGD, {"lr": 1}, ["velocity"]),
        (optim.RMSprop, {}, ["v", "velocity"]),
        (optim.AdamW, {}, ["m", "v"]),
    ],
)
def test_names_of_the_state(cls, options, buffers):
    state = cls(layer_of(W=np.ones(2)), **options).state_dict()
    assert [key for key in state if "." in key] == ["0.W.step", *(f"0.W.{b}" for b in buffers)]
    for name in buffers:
        np.testing.assert_array_equal(state[f"0.W.{name}"], np.zeros(2))


def without(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.__setitem__(key, value)


BAD_STATES = [
    (without("lr"), ValueError, r"missing: lr, unknown: none"),
    (without("0.W.m"), ValueError, r"missing: 0\.W\.m, unknown: none"),
    (put("0.W.u", 1), ValueError, r"missing: none, unknown: 0\.W\.u"),
    (put(3, 1), ValueError, r"unknown: 3"),
    (put("lr", "0.1"), TypeError, r"lr: expected a finite number >= 0, got '0\.1'"),
    (put("lr", -1.0), ValueError, r"lr: expected a finite number >= 0, got -1\.0"),
    (put("lr", np.array([0.1])), TypeError, r"lr: expected a finite number >= 0, got array"),
    (put("eps", None), TypeError, r"eps: expected a finite number >= 0, got None"),
    (put("betas", (0.9, 1.0)), ValueError, r"betas: expected two numbers >= 0 and < 1, got \(0"),
    (put("0.gamma.step", -1), TypeError, r"gamma\.step: expected ndarray of uint64, got int"),
    (put("0.gamma.step", np.array(-1)), TypeError, r"step: .* of uint64, got dtype int64"),
    (
        put("0.gamma.step", np.array(2**63, np.uint64)),
        ValueError,
        r"0\.gamma\.step: expected a number of updates, got 9223372036854775808",
    ),
    (put("0.gamma.m", 1.0), TypeError, r"0\.gamma\.m: expected ndarray of float32, got float"),
    (
        put("0.gamma.m", np.zeros(7)),
        TypeError,
        r"0\.gamma\.m: expected ndarray of float32, got dtype float64",
    ),
    (
        put("0.gamma.v", np.zeros(6, np.float32)),
        ValueError,
        r"0\.gamma\.v: expected shape \(7,\), got \(6,\)",
    ),
    (
        put("0.W.v", np.zeros((3, 5), np.float32)),
        ValueError,
        r"0\.W\.v: expected shape \(5, 3\), got \(3, 5\)",
    ),
]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_STATES)
def test_bad_states_are_refused_whole(spoil, error, message):
    layer = FakeLayer()
    layer.backward()
    opt = optim.Adam(layer, lr=0.25)
    opt.step()
    good = opt.state_dict()
    other = FakeLayer()
    other.backward(3)
    donor = optim.Adam(other, lr=0.125, eps=1e-3)
    donor.step()
    donor.step()
    state = donor.state_dict()
    spoil(state)
    with pytest.raises(error, match=message):
        opt.load_state_dict(state)
    now = opt.state_dict()
    assert_same([np.asarray(v) for v in good.values()], [np.asarray(v) for v in now.values()])


def test_states_of_other_optimizers_and_no_mappings_are_refused():
    opt = optim.SGD(FakeLayer(), lr=0.1)
    with pytest.raises(ValueError, match=r"missing: .*momentum.*unknown: .*0\.W\.m"):
        opt.load_state_dict(optim.Adam(FakeLayer()).state_dict())
    with pytest.raises(TypeError, match="state: expected a mapping, got list"):
        opt.load_state_dict([])


def test_nesterov_is_a_flag_in_states():
    opt = optim.SGD(FakeLayer(), lr=0.1, momentum=0.5, nesterov=True)
    state = opt.state_dict()
    assert state["nesterov"] is True
    opt.load_state_dict({**state, "nesterov": np.array(False)})
    assert opt.nesterov is False
    with pytest.raises(TypeError, match="nesterov: expected True or False, got 1"):
        opt.load_state_dict({**state, "nesterov": 1})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_train_on_with_their_own_layers_and_no_hooks(duplicate):
    layer = FakeLayer()
    opt = optim.Adam(layer)
    layer.backward()
    opt.step()
    called = []
    opt.register_step_pre_hook(lambda _: called.append(1))
    opt.attach()
    twin_layer, twin = duplicate((layer, opt))
    twin_layer.backward(1)
    twin.step()
    assert called == []
    layer.backward(1)
    assert called == [1]
    assert_same(snapshot(layer), snapshot(twin_layer))


def test_copies_of_layers_that_keep_their_hooks_are_not_attached():
    layer = FakeLayer()
    layer.hooks = SimpleNamespace(
        mine=[], run=lambda owner: [hook(owner) for hook in owner.hooks.mine]
    )
    layer.register_grad_hook = lambda hook: (
        layer.hooks.mine.append(hook) or SimpleNamespace(remove=layer.hooks.mine.clear)
    )
    opt = optim.SGD(layer, lr=0.1)
    opt.attach()
    twin, _ = copy.deepcopy((layer, opt))
    before = [p.copy() for p in twin.params.values()]
    twin.backward()
    assert_same(list(twin.params.values()), before)


# Layers, arguments and gradients that are refused.


def test_one_layer_needs_no_list_and_a_generator_will_do():
    layer = FakeLayer()
    layer.backward()
    optim.SGD(layer, lr=0.1).step()
    optim.SGD((x for x in [layer]), lr=0.1).step()
    twin = FakeLayer()
    grads = twin.backward()
    assert grads is None
    for _ in range(2):
        optim.SGD([twin], lr=0.1).step()
    assert_same(list(layer.params.values()), list(twin.params.values()))


def test_layers_without_entries_and_arrays_without_elements():
    empty, nothing = layer_of(), layer_of(W=np.zeros((0, 3), np.float32), s=np.array(2.0))
    for cls, options in VARIANTS.values():
        opt = cls([empty, nothing], **options)
        opt.register_step_pre_hook(optim.GradientClipping(1.0))
        opt.step()
        opt.load_state_dict(opt.state_dict())
    assert nothing.params["s"] < 2
    optim.SGD(empty, lr=1.0).step()


twice = layer_of(W=np.zeros(2))
shared = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (3, TypeError, r"layers\[0\]: expected the mappings params and grads, got int"),
        ([], ValueError, "layers: expected at least one layer, got none"),
        ([twice, "relu"], TypeError, r"layers\[1\]: expected the mappings .*, got str"),
        (
            [SimpleNamespace(params=[1], grads={})],
            TypeError,
            "expected the mappings .*, got Simple",
        ),
        ([twice, twice], ValueError, r"layers\[1\].* expected memory of its own, got that of"),
        (
            SimpleNamespace(params={"W": shared}, grads={"W": shared}),
            ValueError,
            r"layers\[0\].grads\['W'\]: expected .* own, got that of layers\[0\].params\['W'\]",
        ),
        (
            [layer_of(W=shared), layer_of(b=shared.T[1])],
            ValueError,
            r"layers\[1\].params\['b'\]: expected .* own, got that of layers\[0\].params\['W'\]",
        ),
        (layer_of(W=[1.0]), TypeError, r"layers\[0\].params\['W'\]: expected ndarray .*, got list"),
        (layer_of(W=np.zeros(2, np.int64)), TypeError, "float32 or float64, got dtype int64"),
        (layer_of(W=np.zeros(2, ">f4")), TypeError, "got dtype >f4"),
    ],
)
def test_refused_layers(layers, error, message):
    with pytest.raises(error, match=message):
        optim.SGD(layers, lr=0.1)


def test_interleaved_arrays_of_one_buffer_are_no_overlap():
    buffer = np.zeros(10)
    layer = layer_of(a=buffer[::2], c=buffer[1::2])
    for name in layer.params:
        layer.grads[name] = np.ones(5)
    optim.SGD(layer, lr=0.1).step()
    np.testing.assert_array_equal(buffer, -0.1)


@pytest.mark.parametrize("value", [-1.0, nan, inf])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (optim.SGD, "lr"), (optim.SGD, "weight_decay"), (optim.RMSprop, "lr"),
        (optim.RMSprop, "eps"), (optim.Adam, "lr"), (optim.Adam, "eps"),
        (optim.AdamW, "weight_decay"),
    ],
)  # fmt: skip
def test_refused_numbers(cls, name, value):
    with pytest.raises(
        ValueError, match=re.escape(f"{name}: expected a finite number >= 0, got {value}")
    ):
        cls(FakeLayer(), **{"lr": 0.1, name: value})


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (optim.SGD, {"lr": None}, TypeError, "lr: expected a finite number >= 0, got None"),
        (optim.SGD, {"lr": True}, TypeError, "lr: expected a finite number >= 0, got True"),
        (optim.SGD, {"lr": 1j}, TypeError, "lr: expected a finite number >= 0, got 1j"),
        (
            optim.SGD,
            {"lr": 1, "momentum": 1},
            ValueError,
            "momentum: expected a number >= 0 and < 1, got 1",
        ),
        (
            optim.SGD,
            {"lr": 1, "nesterov": True},
            ValueError,
            "nesterov: expected a momentum > 0 with it, got 0",
        ),
        (
            optim.SGD,
            {"lr": 1, "nesterov": "no"},
            TypeError,
            "nesterov: expected True or False, got 'no'",
        ),
        (optim.RMSprop, {"alpha": 1.5}, ValueError, "alpha: expected a number >= 0 and < 1"),
        (optim.Adam, {"betas": 0.9}, TypeError, "betas: expected two numbers .*, got 0.9"),
        (optim.Adam, {"betas": (0.9,)}, ValueError, "betas: expected two numbers .*, got"),
        (optim.Adam, {"betas": (1.0, 0.9)}, ValueError, "betas: expected two numbers >= 0 and < 1"),
        (optim.Adam, {"betas": (0.9, "x")}, ValueError, "betas: expected two numbers .*, got"),
        (optim.Adam, {"decays": "W"}, TypeError, "decays: expected a callable, got str"),
    ],
)
def test_refused_arguments(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(FakeLayer(), **options)


def test_numbers_may_be_of_numpy_and_are_checked_when_set():
    opt = optim.SGD(FakeLayer(), lr=np.float32(0.5), momentum=np.array(0.5))
    assert type(opt.lr) is float
    assert (opt.lr, opt.momentum) == (0.5, 0.5)
    opt.lr = 2
    assert type(opt.lr) is float
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0, got -2"):
        opt.lr = -2
    with pytest.raises(ValueError, match=r"lr: expected a finite number >= 0, got 10{400}"):
        opt.lr = 10**400
    with pytest.raises(ValueError, match="momentum: expected a number >= 0 and < 1, got 3"):
        opt.momentum = 3
    assert (opt.lr, opt.momentum) == (2.0, 0.5)


def test_momentum_may_be_switched_on_later():
    late, early = FakeLayer(), FakeLayer()
    opts = optim.SGD(late, lr=0.1), optim.SGD(early, lr=0.1, momentum=0.9)
    opts[0].momentum = 0.9
    for t in range(3):
        for layer, opt in zip((late, early), opts, strict=True):
            layer.backward(t)
            opt.step()
    assert_same(snapshot(late), snapshot(early))


def set_in(where, name, value):
    return lambda layer: getattr(layer, where).__setitem__(name, value)


def freeze(layer):
    layer.params["gamma"].flags.writeable = False


GRADS, PARAMS = (
    r"layers\[1\].grads\['gamma'\]: expected ",
    r"layers\[1\].params\['gamma'\]: expected ",
)
FLOATS = GRADS + "ndarray of float32 or float64, got "


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda layer: layer.grads.pop("gamma"), TypeError, FLOATS + "NoneType"),
        (set_in("grads", "gamma", [0.0] * 7), TypeError, FLOATS + "list"),
        (set_in("grads", "gamma", np.zeros(7, np.float16)), TypeError, FLOATS + "dtype float16"),
        (
            set_in("grads", "gamma", np.zeros((7, 1))),
            ValueError,
            GRADS + r"shape \(7,\), got \(7, 1",
        ),
        (
            set_in("params", "gamma", np.zeros(8, "f")),
            ValueError,
            PARAMS + r"shape \(7,\), got \(8",
        ),
        (
            set_in("params", "gamma", np.zeros(7)),
            TypeError,
            PARAMS + "ndarray of float32, got dtype",
        ),
        (set_in("params", "gamma", [0.0] * 7), TypeError, PARAMS + "ndarray of float32, got list"),
        (lambda layer: layer.params.pop("gamma"), TypeError, PARAMS + ".* got NoneType"),
        (freeze, ValueError, PARAMS + "a writeable array, got a read-only one"),
    ],
)
def test_a_step_that_cannot_be_done_changes_nothing(spoil, error, message):
    layers = [FakeLayer(0), FakeLayer(1)]
    opt = optim.Adam(layers)
    called = []
    opt.register_step_pre_hook(called.append)
    for layer in layers:
        layer.backward()
    spoil(layers[1])
    kept = [a.copy() for a in (*layers[0].params.values(), layers[1].params["W"])]
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(error, match=message):
            opt.step()
    assert called == []
    assert_same(kept, [*layers[0].params.values(), layers[1].params["W"]])
    state = opt.state_dict()
    assert [v for key, v in state.items() if key.endswith(".step")] == [0] * 4
    assert not any(v.any() for key, v in state.items() if key.endswith((".m", ".v")))


def test_gradients_may_be_read_only():
    layer = layer_of(W=np.zeros(2))
    layer.grads["W"].flags.writeable = False
    optim.SGD(layer, lr=1.0).step()
    np.testing.assert_array_equal(layer.params["W"], -1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.WeightDecay(-1), ValueError, "rate: expected a finite number >= 0, got -1"),
        (
            lambda: optim.GradientClipping(0),
            ValueError,
            "max_norm: expected a finite number > 0, got 0",
        ),
        (lambda: optim.GradientClipping("1"), TypeError, "max_norm: expected a finite .*, got '1'"),
        (
            lambda: optim.SGD(FakeLayer(), 0.1).register_step_pre_hook(None),
            TypeError,
            "hook: expected a callable, got NoneType",
        ),
    ],
)
def test_refused_hooks(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Learning-rate decay.


def test_decays_follow_their_formulas():
    for epoch in (0, 1, 2, 9, 10, 25):
        assert optim.inverse_time_decay(0.2, epoch) == 0.2 / (1 + epoch)
        assert optim.inverse_time_decay(0.2, epoch, decay=0.1) == 0.2 / (1 + 0.1 * epoch)
        assert optim.exponential_decay(0.2, epoch) == 0.2 * 0.95**epoch
        assert optim.exponential_decay(0.2, epoch, rate=0.5) == 0.2 * 0.5**epoch
        assert optim.staircase_decay(0.2, epoch) == 0.2 * 0.5 ** (epoch // 10)
        assert optim.staircase_decay(0.2, epoch, factor=0.1, every=4) == 0.2 * 0.1 ** (epoch // 4)
        half_wave = (1 + cos(pi * epoch / 25)) / 2
        assert optim.cosine_decay(0.2, epoch, epochs=25) == pytest.approx(0.2 * half_wave)
    assert optim.cosine_decay(0.2, 0, epochs=5, lr_min=0.1) == 0.2
    assert optim.cosine_decay(0.2, 5, epochs=5, lr_min=0.1) == 0.1
    assert optim.cosine_decay(0.2, 50, epochs=5, lr_min=0.1) == 0.1


@pytest.mark.parametrize(
    "decay",
    [
        optim.inverse_time_decay,
        optim.exponential_decay,
        optim.staircase_decay,
        lambda lr, epoch: optim.cosine_decay(lr, epoch, epochs=9),
    ],
)
def test_decays_refuse_what_is_no_rate_or_epoch(decay):
    assert type(decay(1, np.int64(3))) is float
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0, got -1"):
        decay(-1, 0)
    with pytest.raises(ValueError, match="epoch: expected a finite number >= 0, got -1"):
        decay(0.1, -1)
    with pytest.raises(TypeError, match="epoch: expected a finite number >= 0, got '1'"):
        decay(0.1, "1")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optim.inverse_time_decay(0.1, 1, -1), ValueError, "decay: expected a finite"),
        (lambda: optim.exponential_decay(0.1, 1, -1), ValueError, "rate: expected a finite"),
        (lambda: optim.staircase_decay(0.1, 1, -1), ValueError, "factor: expected a finite"),
        (
            lambda: optim.exponential_decay(0.1, 1e5, 2.0),
            ValueError,
            "rate: expected one whose power 100000 float64 can hold, got 2.0",
        ),
        (lambda: optim.staircase_decay(0.1, 1e5, 1e99), ValueError, "factor: expected one whose"),
        (
            lambda: optim.staircase_decay(0.1, 1, every=0),
            ValueError,
            "every: expected an integer >= 1, got 0",
        ),
        (
            lambda: optim.cosine_decay(0.1, 1, epochs=2.5),
            TypeError,
            "epochs: expected an integer >= 1, got 2.5",
        ),
        (
            lambda: optim.cosine_decay(0.1, 1, epochs=0),
            ValueError,
            "epochs: expected an integer >= 1, got 0",
        ),
    ],
)
def test_decays_refuse_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()
