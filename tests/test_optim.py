"""What the optimizers compute, and learning-rate decay."""

import inspect
from math import cos, inf, nan, pi

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import (
    VARIANTS,
    FakeLayer,
    assert_same,
    everything_decays,
    layer_of,
    padded,
    variants,
)

from fastbn import optim

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
            "rate: expected one whose power 100000 is finite, got 2.0",
        ),
        (lambda: optim.staircase_decay(0.1, 1e5, 1e99), ValueError, "factor: expected one whose"),
        (lambda: optim.exponential_decay(1e300, 1, 1e300), ValueError, "rate: expected one whose"),
        (
            lambda: optim.cosine_decay(0.1, 1, epochs=10**5000),
            ValueError,
            "epochs: expected an integer >= 1, got an integer of 64 bits or more",
        ),
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
