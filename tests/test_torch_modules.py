"""The modules of fastbn.torch, beside PyTorch's of the same names."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import fastbn.torch as ours  # noqa: E402

NAMES = [f"{kind}{d}d" for kind in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.4, "eps": 1e-3},
    {"affine": True, "track_running_stats": True},
    {"affine": False, "track_running_stats": False},
    {"track_running_stats": True, "dtype": torch.float64},
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20150211)


def batch(name, dtype=torch.float32):
    return torch.randn(4, 3, *[5] * int(name[-2]), dtype=dtype)


def pair(name, **options):
    """Return our module and PyTorch's, with the same parameters."""
    mine, theirs = getattr(ours, name)(3, **options), getattr(nn, name)(3, **options)
    with torch.no_grad():
        for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            other.copy_(torch.rand(3))
            own.copy_(other)
    return mine, theirs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_modules_do_as_those_of_torch(name, options):
    mine, theirs = pair(name, **options)
    assert isinstance(mine, getattr(nn, name))
    assert repr(mine) == repr(theirs)
    for mode in (True, True, False):
        x = batch(name, options.get("dtype", torch.float32))
        results = []
        for module in (mine.train(mode), theirs.train(mode)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.pow(3).sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_files(name):
    module = getattr(ours, name)(3, affine=True, track_running_stats=True, activation="relu")
    x = batch(name)
    module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(other) is type(module)
        assert other.activation == "relu"
        assert torch.equal(other.eval()(x), module.eval()(x))
        assert "activation='relu'" in repr(other)
        module.train()


@pytest.mark.parametrize("name", NAMES)
def test_lazy_modules_become_ours(name):
    lazy = getattr(ours, f"Lazy{name}")(affine=True, activation="relu")
    assert isinstance(lazy, getattr(nn, f"Lazy{name}"))
    x = batch(name)
    y = lazy(x)
    assert "_Norm" in type(y.grad_fn).__name__
    assert type(lazy) is getattr(ours, name)
    assert torch.equal(y, getattr(ours, name)(3, affine=True, activation="relu")(x))


def test_a_residual_and_an_activation_follow():
    x, residual = torch.randn(2, 4, 3, 5, 5).unbind()
    y = ours.BatchNorm2d(3, activation="relu")(x, residual)
    torch.testing.assert_close(y, torch.relu(nn.BatchNorm2d(3)(x) + residual))
    with pytest.raises(ValueError, match="activation: expected None"):
        ours.BatchNorm2d(3, activation="gelu")


def test_other_devices_and_wrong_inputs_are_those_of_torch():
    module = ours.BatchNorm2d(3, device="meta")
    assert module(torch.empty(4, 3, 5, 5, device="meta")).device.type == "meta"
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        ours.BatchNorm2d(3)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours.BatchNorm1d(3)(torch.randn(1, 3))


def test_autocast_does_as_torch():
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for made in (x, x.bfloat16()):
            mine, theirs = ours.BatchNorm2d(3)(made), nn.BatchNorm2d(3)(made)
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs)


def test_tracing_sees_the_operator_of_torch():
    module = ours.BatchNorm2d(3).eval()
    with pytest.warns(DeprecationWarning, match="torch.jit"):  # PyTorch's own, of 2.9
        traced = torch.jit.trace(module, torch.randn(4, 3, 5, 5))
    assert "aten::batch_norm" in str(traced.inlined_graph)
