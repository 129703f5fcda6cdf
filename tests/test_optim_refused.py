"""Layers, arguments and gradients that optimizers refuse."""

import re
from dataclasses import dataclass
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import pytest
from optim_cases import VARIANTS, FakeLayer, assert_same, layer_of, snapshot

from fastbn import optim


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


def test_a_gradient_that_holds_the_place_may_be_shared():
    nothing = np.zeros(())
    params = {"W": np.ones((2, 3)), "b": np.ones(2)}
    layer = SimpleNamespace(params=params, grads=dict.fromkeys(params, nothing))
    opt = optim.SGD(layer, lr=0.5)
    layer.grads = {name: np.ones_like(p) for name, p in params.items()}
    opt.step()
    np.testing.assert_array_equal(params["b"], 0.5)


def test_interleaved_arrays_of_one_buffer_are_no_overlap():
    buffer = np.zeros(10)
    layer = layer_of(a=buffer[::2], c=buffer[1::2])
    for name in layer.params:
        layer.grads[name] = np.ones(5)
    optim.SGD(layer, lr=0.1).step()
    np.testing.assert_array_equal(buffer, -0.1)


BUFFER = np.zeros((6, 8))
OVERLAPS = {
    "nested": [BUFFER[1], BUFFER[4:], BUFFER[:5]],
    "the same memory under another shape": [BUFFER, BUFFER.reshape(8, 6)],
    "backwards": [BUFFER[::-1, ::-1], BUFFER[3]],
    "across": [BUFFER[:, 2], BUFFER[5]],
    "the last element": [BUFFER[:3], BUFFER[2:, 7]],
    "not neighbours by address": [BUFFER[:, :7], BUFFER[1, 7:], BUFFER[4, 6:]],
    "another dtype": [BUFFER, BUFFER.view(np.float32)[5, 15:]],
    "a number of one's own": [BUFFER, BUFFER[5, 7, ...]],
}
APART = {
    "neighbours": [BUFFER[:3], BUFFER[3:]],
    "columns": [BUFFER[:, :3], BUFFER[:, 3:]],
    "backwards": [BUFFER[::-2], BUFFER[::2]],
    "no elements": [BUFFER, BUFFER[2:2], BUFFER[:, 3:3]],
}


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("name", OVERLAPS)
def test_arrays_that_overlap_are_found(name, turn):
    arrays = OVERLAPS[name][::turn]
    layer = layer_of(**{f"W{i}": array for i, array in enumerate(arrays)})
    with pytest.raises(ValueError, match=r"W\d'\]: expected memory of its own, got that of layers"):
        optim.SGD(layer, lr=0.1)


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("name", APART)
def test_arrays_that_interleave_or_touch_do_not_overlap(name, turn):
    layer = layer_of(**{f"W{i}": a for i, a in enumerate(APART[name][::turn])})
    state = optim.SGD(layer, lr=0.1).state_dict()
    assert {f"0.{name}.step" for name in layer.params} <= state.keys()


def test_a_gradient_that_is_no_array_is_refused_by_the_step():
    layer = SimpleNamespace(params={"W": np.ones(2)}, grads={"W": [1.0, 2.0]})
    opt = optim.SGD(layer, lr=0.5)
    with pytest.raises(TypeError, match="expected ndarray of float32 or float64, got list"):
        opt.step()


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
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0, got an integer"):
        opt.lr = 10**400
    with pytest.raises(ValueError, match="momentum: expected a number >= 0 and < 1, got 3"):
        opt.momentum = 3
    assert (opt.lr, opt.momentum) == (2.0, 0.5)


def test_nesterov_without_momentum_is_refused_wherever_it_is_set():
    message = "nesterov: expected a momentum > 0 with it, got 0"
    opt = optim.SGD(FakeLayer(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        opt.nesterov = True
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict({**opt.state_dict(), "lr": 0.2, "nesterov": True})
    assert (opt.lr, opt.momentum, opt.nesterov) == (0.1, 0.0, False)
    opt.momentum = 0.5
    opt.nesterov = True
    with pytest.raises(ValueError, match=message):
        opt.momentum = 0
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict({**opt.state_dict(), "momentum": 0.0})
    assert (opt.momentum, opt.nesterov) == (0.5, True)
    opt.load_state_dict({**opt.state_dict(), "momentum": 0.0, "nesterov": False})
    opt.load_state_dict({**opt.state_dict(), "momentum": 0.5, "nesterov": True})
    assert (opt.momentum, opt.nesterov) == (0.5, True)


def test_an_optimizer_of_ones_own_may_have_other_numbers():
    @dataclass(eq=False)
    class Slow(optim.SGD):
        patience: float = 2.0

    opt = Slow(FakeLayer(), lr=0.1)
    opt.load_state_dict({**opt.state_dict(), "patience": 3})
    assert opt.patience == 3.0
    with pytest.raises(ValueError, match="patience: expected a finite number >= 0, got -1"):
        opt.load_state_dict({**opt.state_dict(), "patience": -1})


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
