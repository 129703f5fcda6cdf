"""`fastbn.torch.batch_norm` and `instance_norm` against PyTorch's own and against float64."""

import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastbn.torch as ours  # noqa: E402

FORMATS = ["contiguous", "channels_last", "transposed", "expanded", "gaps"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FUSED = [(None, False), ("relu", False), ("relu", True), ("leaky_relu", True), (None, True)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20150211)


def images(layout, dtype=torch.float32, mean=0.0):
    x = mean + torch.randn(6, 5, 4, 7, dtype=torch.float64)
    x = x.to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "expanded":
        return x[:1].expand(6, 5, 4, 7)
    if layout == "gaps":
        return x.repeat(1, 1, 1, 2)[..., ::2]
    return x


def leaf(tensor):
    """Return a leaf that requires a gradient, with the same strides."""
    return tensor.detach().requires_grad_()


def step(function, x, dy, dtype, **options):
    """Return y, the gradients of x, weight and bias, and the running statistics."""
    x = leaf(x.to(dtype))
    weight, bias = (leaf(torch.linspace(a, 2, 5, dtype=dtype)) for a in (-1, 0.5))
    mean, var = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    y = function(x, mean, var, weight, bias, True, 0.3, **options)
    y.backward(dy.to(dtype))
    return [y.detach(), x.grad, weight.grad, bias.grad, mean, var]


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_are_those_of_torch_or_smaller(name, layout, mean, dtype):
    x, dy = images(layout, dtype, mean), images(layout, dtype)
    theirs, mine = getattr(functional, name), getattr(ours, name)
    exact = step(theirs, x, dy, torch.float64)
    for own, other, true in zip(
        step(mine, x, dy, dtype), step(theirs, x, dy, dtype), exact, strict=True
    ):
        assert own.dtype == dtype
        scale = true.abs().max()
        error, allowed = ((each - true).abs().max() / scale for each in (own, other))
        factor = 8 if dtype is torch.float32 else 64 * (1 + mean)  # the truth is float64, too
        assert error <= allowed + factor * torch.finfo(dtype).eps


@pytest.mark.parametrize(("activation", "added"), FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_what_follows_agrees_with_steps(name, layout, dtype, activation, added):
    x, dy, residual = (images(layout, dtype) for _ in range(3))
    residual = leaf(residual) if added else None

    def steps(*args):
        y = getattr(functional, name)(*args)
        y = y if residual is None else y + residual.double()
        return y if activation is None else getattr(functional, activation)(y)

    options = {"activation": activation, "residual": residual}
    found = step(getattr(ours, name), x, dy, dtype, **options)
    if added:
        found.append(residual.grad)
        residual.grad = None
    wanted = step(steps, x, dy, torch.float64)
    if added:
        wanted.append(residual.grad)
    assert found[0].stride() == x.stride()
    sizes = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 4e-6, torch.float64: 1e-13}
    for own, true in zip(found, wanted, strict=True):
        error = (own.double() - true.double()).abs().max() / true.double().abs().max()
        assert error <= sizes[dtype]


@pytest.mark.parametrize("kind", ["x", "weight", "bias", "residual"])
def test_only_what_needs_a_gradient_gets_one(kind):
    tensors = {
        "x": torch.randn(4, 3, 5), "weight": torch.rand(3), "bias": torch.rand(3),
        "residual": torch.randn(4, 3, 5),
    }  # fmt: skip
    tensors[kind].requires_grad_()
    x, weight, bias, residual = tensors.values()
    y = ours.batch_norm(x, None, None, weight, bias, True, residual=residual)
    y.sum().backward()
    assert [n for n, t in tensors.items() if t.grad is not None] == [kind]
    assert not ours.batch_norm(
        *(t.detach() for t in (x, x[0, :, 0], x[0, :, 0] ** 2))
    ).requires_grad


def test_gradcheck():
    x, residual = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for function in (ours.batch_norm, ours.instance_norm):
        for own in (True, False):
            for activation in (None, "leaky_relu"):

                def norm(x, weight, bias, residual, f=function, own=own, act=activation):
                    given = (None, None) if own else (mean, var)
                    return f(x, *given, weight, bias, own, activation=act, residual=residual)

                assert torch.autograd.gradcheck(norm, (x, weight, bias, residual))


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_differentiating_twice_raises(wanted):
    x = torch.randn(4, 3, 5, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    y = ours.batch_norm(x, None, None, weight, training=True)
    of = {"x": x, "weight": weight}[wanted]
    (grad,) = torch.autograd.grad(y.square().sum(), of, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    # Where dy is constant, the gradient depends on x all the same, and is not silently detached.
    y = ours.batch_norm(x, None, None, weight, training=True)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_running_statistics_of_other_types_and_strides():
    x = torch.randn(8, 3, 4) + 2
    for dtype in (torch.float16, torch.bfloat16):
        mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        wanted = mean.clone(), var.clone()
        ours.batch_norm(x.to(dtype), mean, var, training=True)
        functional.batch_norm(x.to(dtype), *wanted, training=True)
        torch.testing.assert_close(mean, wanted[0])
        torch.testing.assert_close(var, wanted[1])
    memory = torch.zeros(2, 6)
    mean, var = memory[0, ::2], memory[1, ::2]
    wanted = torch.zeros(3), torch.zeros(3)
    ours.batch_norm(x, mean, var, training=True)
    functional.batch_norm(x, *wanted, training=True)
    torch.testing.assert_close(torch.stack((mean, var)), torch.stack(wanted))
    assert not memory[:, 1::2].any()


def test_changes_in_place_are_seen():
    x, mean, var = torch.randn(4, 3, requires_grad=True), torch.zeros(3), torch.ones(3)
    versions = mean._version, var._version
    y = ours.batch_norm(x * 1, mean, var, training=True)
    assert (mean._version, var._version) > versions
    z = x * 1
    y = ours.batch_norm(z, None, None, training=True)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # Running statistics are copied, so later minibatches do not hinder: in evaluation, say.
    y = ours.batch_norm(x, mean, var)
    ours.batch_norm(x.detach(), mean, var, training=True)
    y.sum().backward()


def test_the_graph_lets_go_of_x():
    x = torch.randn(64, 32, requires_grad=True)
    z = x * 1
    there = weakref.ref(z)
    y = ours.batch_norm(z, None, None, training=True, activation="relu")
    del z
    y.sum().backward()
    gc.collect()
    assert there() is None
    assert y.grad_fn is not None


@pytest.mark.parametrize("activation", [None, "relu"])
def test_activations_computed_again(activation):
    """Saved tensors come from hooks: with other addresses, and perhaps other strides."""

    def norm(x):
        return ours.batch_norm(x * 1, None, None, training=True, activation=activation)

    x = images("channels_last", torch.float64).requires_grad_()
    dy = torch.randn_like(x.detach())
    (wanted,) = torch.autograd.grad(norm(x), x, dy)
    (again,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False), x, dy)
    assert torch.equal(again, wanted)
    with torch.autograd.graph.save_on_cpu():
        y = norm(x)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], wanted)


REFUSED = {
    "complex": lambda: (torch.randn(4, 3, dtype=torch.complex64), None, None, None, None, True),
    "integers": lambda: (torch.ones(4, 3, dtype=torch.int64), None, None, None, None, True),
    "one axis": lambda: (torch.randn(4), None, None, None, None, True),
    "one value": lambda: (torch.randn(1, 3), None, None, None, None, True),
    "no statistics": lambda: (torch.randn(4, 3), None, None),
    "wrong size": lambda: (torch.randn(4, 3), torch.zeros(4), torch.ones(4)),
    "weight of another type": lambda: (
        torch.randn(4, 3), None, None, torch.ones(3).double(), None, True
    ),
    "weight of wrong size": lambda: (torch.randn(4, 3), None, None, torch.ones(4), None, True),
    "eps below 0": lambda: (torch.randn(4, 3), None, None, None, None, True, 0.1, -1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused(case):
    errors = []
    for function in (functional.batch_norm, ours.batch_norm):
        try:
            function(*REFUSED[case]())
            errors.append(None)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert errors[0] == errors[1]


OTHERS = {
    "no values": lambda: (torch.randn(0, 3, 4), None, None, None, None, True),
    "variance below 0": lambda: (torch.randn(4, 3), torch.zeros(3), -torch.ones(3)),
    "variance little below 0": lambda: (torch.randn(4, 3), torch.zeros(3), torch.full((3,), -1e-6)),
    "device meta": lambda: (torch.randn(4, 3, device="meta"), None, None, None, None, True),
    "negative view": lambda: (torch.randn(4, 3, dtype=torch.complex64).conj().imag,
                              None, None, None, None, True),
    "float32 beside bfloat16": lambda: (
        torch.randn(4, 3, 9).bfloat16(), torch.zeros(3), torch.ones(3), torch.rand(3), None, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_else_torch_takes(case):
    results = []
    for function in (functional.batch_norm, ours.batch_norm):
        torch.manual_seed(1)
        results.append(function(*OTHERS[case]()))
    assert results[1].device == results[0].device
    assert results[1].dtype == results[0].dtype
    if results[0].device.type == "cpu":
        torch.testing.assert_close(results[1], results[0], equal_nan=True)


def test_plain_calls_are_ours():
    x = torch.randn(4, 3, 5, requires_grad=True)
    assert "_Norm" in type(ours.batch_norm(x, None, None, training=True).grad_fn).__name__
    assert "_Norm" in type(ours.instance_norm(x).grad_fn).__name__


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own
def test_transforms_of_torch_func():
    x, dx = torch.randn(2, 4, 3, 5, dtype=torch.float64)[:2].unbind()

    def norm(x):
        return ours.batch_norm(x, None, None, training=True)

    def theirs(x):
        return functional.batch_norm(x, None, None, training=True)

    for transformed in (
        lambda f: torch.func.jvp(f, (x,), (dx,))[1],
        lambda f: torch.func.grad(lambda x: f(x).pow(3).sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack((x, dx))),
    ):
        torch.testing.assert_close(transformed(norm), transformed(theirs))


def test_a_residual_that_has_to_be_broadcast_is_added_by_torch():
    x, residual = torch.randn(4, 3, 5), torch.randn(3, 1)
    y = ours.batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    wanted = torch.relu(functional.batch_norm(x, None, None, training=True) + residual)
    torch.testing.assert_close(y, wanted)


def test_wrong_arguments_are_named():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="activation: expected None, 'relu' or"):
        ours.batch_norm(x, None, None, training=True, activation="gelu")
    with pytest.raises(TypeError, match="residual: expected a Tensor or None, got ndarray"):
        ours.batch_norm(x, None, None, training=True, residual=np.zeros((4, 3), np.float32))


def test_results_are_the_same_at_any_number_of_threads(threads):
    x = torch.randn(16, 64, 28, 28)
    y = ours.batch_norm(x, None, None, training=True, activation="relu")
    assert torch.equal(y, ours.batch_norm(x.clone(), None, None, training=True, activation="relu"))
    assert y.numpy().tobytes() == _bits.setdefault("y", y.numpy().tobytes())


_bits = {}
