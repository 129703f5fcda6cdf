"""Saving, loading and copying optimizers."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from optim_cases import (
    FakeLayer,
    assert_same,
    layer_of,
    snapshot,
    variants,
)

from fastbn import optim


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
