"""The layers, and networks of them, against finite differences and against torch."""

from functools import partial

import numpy as np
import pytest

import fastbn
from fastbn.demo.layers import (
    Conv2d,
    Flatten,
    GlobalAveragePool,
    Layer,
    Linear,
    ReLU,
    col2im,
    im2col,
    softmax_cross_entropy,
)
from fastbn.demo.network import ResBlock, Sequential, fold, mlp, resnet

WIDE = np.float64


def difference_quotient(function, array, step=1e-6):
    """Return d function() / d array, element by element; array is left as it was."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = function()
        array[index] = value - step
        below = function()
        array[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient


def parameters(layer):
    """Return (name, parameter, gradient or None) of a layer or of all layers in a container."""
    leaves = layer.leaves() if hasattr(layer, "leaves") else {"": layer}
    return [
        (f"{at}.{name}", value, leaf.grads.get(name))
        for at, leaf in leaves.items()
        for name, value in leaf.params.items()
    ]


class Added(ReLU):
    """ReLU of x + x / 2."""

    def forward(self, x):
        return super().forward(x, residual=x / 2)

    def backward(self, dy):
        dx, dresidual = super().backward(dy)
        return dx + dresidual / 2


LAYERS = {
    "linear": lambda rng: (Linear(3, 4, bias=False, rng=rng, dtype=WIDE), (5, 3)),
    "linear with bias": lambda rng: (Linear(3, 4, bias=True, rng=rng, dtype=WIDE), (5, 3)),
    "conv": lambda rng: (Conv2d(2, 3, bias=False, rng=rng, dtype=WIDE), (2, 2, 4, 5)),
    "conv with bias": lambda rng: (Conv2d(2, 3, bias=True, rng=rng, dtype=WIDE), (2, 2, 4, 5)),
    "conv 1, stride 2": lambda rng: (
        Conv2d(2, 3, 1, stride=2, bias=False, rng=rng, dtype=WIDE),
        (2, 2, 5, 4),
    ),
    "conv 5, stride 2": lambda rng: (
        Conv2d(1, 2, 5, stride=2, bias=False, rng=rng, dtype=WIDE),
        (2, 1, 5, 6),
    ),
    "relu": lambda _: (ReLU(), (3, 4)),
    "flatten": lambda _: (Flatten(), (2, 3, 2, 2)),
    "relu with a residual": lambda _: (Added(), (3, 4)),
    "pool": lambda _: (GlobalAveragePool(), (2, 3, 3, 2)),
    "batch norm": lambda _: (fastbn.BatchNorm(3, dtype=WIDE), (4, 3, 2, 2)),
    "nothing": lambda _: (Sequential(), (2, 3)),
    "block": lambda rng: (ResBlock(2, 2, norm="batch", rng=rng, dtype=WIDE), (3, 2, 4, 4)),
    "block without norm": lambda rng: (
        ResBlock(2, 2, norm="none", rng=rng, dtype=WIDE),
        (3, 2, 4, 4),
    ),
    "block with instance norm": lambda rng: (
        ResBlock(2, 2, norm="instance", rng=rng, dtype=WIDE),
        (3, 2, 4, 4),
    ),
    "block, zero gamma": lambda rng: (
        ResBlock(2, 2, norm="batch", zero_gamma=True, rng=rng, dtype=WIDE),
        (3, 2, 4, 4),
    ),
    "block, stride 2": lambda rng: (
        ResBlock(2, 3, stride=2, norm="batch", rng=rng, dtype=WIDE),
        (3, 2, 5, 4),
    ),
    "mlp": lambda rng: (mlp([8, 5, 3], norm="batch", rng=rng, dtype=WIDE), (4, 2, 2, 2)),
    "mlp without norm": lambda rng: (mlp([6, 5, 4, 3], norm="none", rng=rng, dtype=WIDE), (4, 6)),
    "resnet": lambda rng: (resnet([1, 2, 3, 4], norm="batch", rng=rng, dtype=WIDE), (3, 1, 4, 4)),
    "resnet with instance norm": lambda rng: (
        resnet([1, 2, 3, 4], norm="instance", rng=rng, dtype=WIDE),
        (3, 1, 4, 4),
    ),
}


NETWORKS = [
    (mlp, "batch"),
    (mlp, "none"),
    (resnet, "batch"),
    (resnet, "instance"),
    (resnet, "none"),
]


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_difference_quotients(name, rng):
    layer, shape = LAYERS[name](rng)
    x = rng.standard_normal(shape)
    dy = rng.standard_normal(layer.forward(x).shape)

    def loss():
        return float((layer.forward(x) * dy).sum())

    loss()
    dx = layer.backward(dy)
    assert dx.shape == x.shape
    np.testing.assert_allclose(dx, difference_quotient(loss, x), rtol=1e-5, atol=1e-7)
    for key, value, gradient in parameters(layer):
        np.testing.assert_allclose(
            gradient, difference_quotient(loss, value), rtol=1e-5, atol=1e-7, err_msg=key
        )


def test_the_loss_is_the_mean_of_minus_log_softmax_with_its_gradient(rng):
    logits, labels = rng.standard_normal((4, 3)), np.array([0, 2, 1, 2])
    loss, dlogits = softmax_cross_entropy(logits, labels)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(softmax[np.arange(4), labels]).mean(), rel=1e-14)
    numeric = difference_quotient(lambda: softmax_cross_entropy(logits, labels)[0], logits)
    np.testing.assert_allclose(dlogits, numeric, rtol=1e-6, atol=1e-9)


def test_the_loss_of_huge_logits_is_finite():
    loss, dlogits = softmax_cross_entropy(np.array([[1e30, -1e30]], np.float32), np.array([0]))
    assert loss == 0
    assert (dlogits == 0).all()


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 3)])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7)])
def test_convolution_is_the_direct_loop(kernel, stride, size, rng):
    conv = Conv2d(2, 3, kernel, stride=stride, bias=True, rng=rng, dtype=WIDE)
    conv.params["bias"][:] = rng.standard_normal(3)
    x = rng.standard_normal((2, 2, *size))
    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h, w = -(-size[0] // stride), -(-size[1] // stride)
    expected = np.empty((2, 3, h, w))
    for i in range(h):
        for j in range(w):
            rows = slice(i * stride, i * stride + kernel)
            columns = slice(j * stride, j * stride + kernel)
            patch = padded[:, :, rows, columns]
            expected[:, :, i, j] = np.einsum("ncij,ocij->no", patch, conv.params["weight"])
    expected += conv.params["bias"][:, None, None]
    np.testing.assert_allclose(conv.forward(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 3)])
def test_col2im_is_the_transpose_of_im2col(kernel, stride, rng):
    x = rng.standard_normal((2, 3, 5, 6))
    columns, _, _ = im2col(x, kernel, stride)
    other = rng.standard_normal(columns.shape)
    back = col2im(other, x.shape, kernel, stride)
    assert (columns * other).sum() == pytest.approx((x * back).sum(), rel=1e-12)


@pytest.mark.parametrize(("build", "norm"), NETWORKS)
def test_a_network_is_float32_throughout(build, norm, rng):
    network = build([4 if build is mlp else 1, 3, 2], norm=norm, rng=rng)
    logits = network.forward(rng.standard_normal((5, 1, 2, 2), dtype=np.float32))
    _, dlogits = softmax_cross_entropy(logits, np.array([0, 1, 0, 1, 1]))
    arrays = [logits, dlogits, network.backward(dlogits)]
    arrays += [array for _, *both in parameters(network) for array in both]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("build", "norm"), NETWORKS)
def test_a_layer_in_front_of_a_norm_has_no_bias(build, norm, rng):
    leaves = list(build([1, 4, 5, 3], norm=norm, rng=rng).leaves().values())
    kind = {"batch": fastbn.BatchNorm, "instance": fastbn.InstanceNorm, "none": ()}[norm]
    norms = 0
    for leaf, following in zip(leaves, [*leaves[1:], None], strict=True):
        if isinstance(leaf, (Linear, Conv2d)):
            assert ("bias" in leaf.params) != isinstance(following, kind)
            norms += isinstance(following, kind)
    assert norms == sum(isinstance(leaf, kind) for leaf in leaves)
    assert (norms > 0) == (norm != "none")


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_with_and_without_norm_weights_start_the_same(norm):
    build = resnet if norm == "instance" else mlp
    networks = [build([8, 4, 3], norm=n, rng=np.random.default_rng(1)) for n in (norm, "none")]
    with_norm, without = (
        [value for name, value, _ in parameters(network) if name.endswith("weight")]
        for network in networks
    )
    for one, other in zip(with_norm, without, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", [mlp, resnet])
def test_a_norm_that_there_is_not(build, rng):
    with pytest.raises(ValueError, match="norm: expected batch, instance or none, got True"):
        build([1, 2, 3], norm=True, rng=rng)


def test_a_block_with_gamma_at_zero_is_its_shortcut_at_first(rng):
    x = np.abs(rng.standard_normal((3, 2, 4, 4)))
    block = ResBlock(2, 2, norm="batch", zero_gamma=True, rng=rng, dtype=WIDE)
    np.testing.assert_array_equal(block.forward(x), x)
    gammas = [p for name, p, _ in parameters(block) if name.endswith("gamma")]
    assert [bool(gamma.any()) for gamma in gammas] == [True, False]
    shrinking = ResBlock(2, 3, stride=2, norm="instance", zero_gamma=True, rng=rng, dtype=WIDE)
    shortcut = shrinking.children["shortcut"].forward(x)
    np.testing.assert_array_equal(shrinking.forward(x), np.maximum(shortcut, 0))


@pytest.mark.parametrize("build", [mlp, resnet])
def test_a_folded_network_computes_the_same(build, rng):
    sizes = [9 if build is mlp else 1, 6, 5, 4]
    network, plain = (build(sizes, norm=n, rng=rng, dtype=WIDE) for n in ("batch", "none"))
    for leaf in network.leaves().values():
        for name, value in leaf.params.items():
            if name in ("gamma", "beta", "bias"):
                value[:] = rng.standard_normal(value.shape)
    for _ in range(3):
        network.forward(rng.standard_normal((8, 1, 3, 3)))
    before = network.state_dict()
    fold(network, plain)
    x = rng.standard_normal((8, 1, 3, 3))
    network.eval()
    np.testing.assert_allclose(plain.forward(x), network.forward(x), rtol=1e-11, atol=1e-11)
    for name, value in network.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_folding_a_network_without_norm_copies_it(rng):
    one, other = (resnet([1, 2, 3, 4], norm="none", rng=rng) for _ in range(2))
    fold(one, other)
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value)


def test_he_initialisation_has_the_variance_two_over_fan_in(rng):
    for layer, fan_in in (
        (Linear(200, 300, bias=True, rng=rng), 200),
        (Conv2d(20, 200, bias=True, rng=rng), 180),
    ):
        assert layer.params["weight"].var() == pytest.approx(2 / fan_in, rel=0.05)
        assert (layer.params["bias"] == 0).all()


def test_train_and_eval_reach_every_layer(rng):
    network = resnet([1, 2, 3, 4], norm="batch", rng=rng)
    network.eval()
    assert not any(leaf.training for leaf in network.leaves().values())
    network.train()
    assert all(leaf.training for leaf in network.leaves().values())


def test_in_eval_mode_examples_do_not_depend_on_each_other(rng):
    network = resnet([1, 2, 3, 4], norm="batch", rng=rng)
    x = rng.standard_normal((6, 1, 4, 4), dtype=np.float32)
    network.forward(x)
    network.eval()
    np.testing.assert_allclose(network.forward(x)[:2], network(x[:2]), rtol=1e-5, atol=1e-6)


def test_state_goes_round(rng):
    x = rng.standard_normal((6, 1, 4, 4), dtype=np.float32)
    one, other = (resnet([1, 2, 3, 4], norm="batch", rng=rng) for _ in range(2))
    one.forward(x)
    state = one.state_dict()
    assert {"1.running_mean", "2.main.0.weight", "3.shortcut.1.bias", "3.end.bias"} <= state.keys()
    other.load_state_dict(state)
    one.eval()
    other.eval()
    np.testing.assert_array_equal(one.forward(x), other.forward(x))
    state["0.weight"][:] = 0  # a copy, not the parameter
    assert one.state_dict()["0.weight"].any()


def test_a_layer_refuses_a_state_that_does_not_fit(rng):
    linear = Linear(2, 3, bias=True, rng=rng)
    before = linear.state_dict()
    for state in ({**before, "bias": np.zeros(1, np.float32)}, {**before, "more": 1}, {}):
        with pytest.raises(ValueError, match=r"(bias|more): expected"):
            linear.load_state_dict(state)
    for name, value in linear.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("1.weight"), "1.weight: expected .* got nothing"),
        (lambda s: s.update(more=np.ones(1)), "more: expected no such entry, got float64"),
        (lambda s: s.update({"1.weight": np.ones((2, 2), np.float32)}), r"\(4, 8\), got .*\(2, 2"),
        (lambda s: s.update({"1.weight": np.ones((4, 8))}), "expected float32 .* got float64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message, rng):
    network = mlp([8, 4, 3], norm="batch", rng=rng)
    before = network.state_dict()
    state = {name: np.zeros_like(value) for name, value in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        network.load_state_dict(state)
    for name, value in network.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_layer_of_ones_own_needs_forward_and_backward():
    with pytest.raises(TypeError, match="abstract"):
        Layer()


def torch_twin(torch, layer, images):
    """Return the torch module of the same computation and the same parameters."""
    nn = torch.nn
    if isinstance(layer, ResBlock):
        shortcut, main, end = (torch_twin(torch, x, images) for x in layer.children.values())

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.shortcut, self.main = shortcut, main
                self.end = end[0] if isinstance(end, nn.Sequential) else nn.Identity()

            def forward(self, x):
                return torch.relu(self.end(self.main(x)) + self.shortcut(x))

        return Block()
    if isinstance(layer, Sequential):
        return nn.Sequential(*(torch_twin(torch, x, images) for x in layer.children.values()))
    if isinstance(layer, (fastbn.BatchNorm, fastbn.InstanceNorm)):
        kind = nn.BatchNorm2d if images else nn.BatchNorm1d
        if isinstance(layer, fastbn.InstanceNorm):
            kind = partial(nn.InstanceNorm2d, affine=True)
        twin = kind(len(layer.gamma)).double()
        return nn.Sequential(twin, nn.ReLU()) if layer.activation else twin
    if isinstance(layer, (ReLU, Flatten)):
        return {ReLU: nn.ReLU, Flatten: nn.Flatten}[type(layer)]()
    if isinstance(layer, GlobalAveragePool):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    bias = "bias" in layer.params
    shape = layer.params["weight"].shape
    if isinstance(layer, Linear):
        twin = nn.Linear(shape[1], shape[0], bias=bias).double()
    else:
        twin = nn.Conv2d(
            shape[1], shape[0], shape[2], layer.stride, padding=shape[2] // 2, bias=bias
        ).double()
    twin.load_state_dict({k: torch.from_numpy(p.copy()) for k, p in layer.params.items()})
    return twin


@pytest.mark.parametrize(("build", "norm"), NETWORKS)
def test_networks_agree_with_torch(build, norm, rng):
    torch = pytest.importorskip("torch")
    network = build([49 if build is mlp else 1, 6, 5, 4], norm=norm, rng=rng, dtype=WIDE)
    twin = torch_twin(torch, network, images=build is resnet)
    x, labels = rng.standard_normal((8, 1, 7, 7)), rng.integers(0, 4, 8)

    logits = network.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    dx = network.backward(dlogits)

    x_torch = torch.from_numpy(x).requires_grad_()
    loss_torch = torch.nn.functional.cross_entropy(twin(x_torch), torch.from_numpy(labels))
    loss_torch.backward()
    assert loss == pytest.approx(loss_torch.item(), rel=1e-12)
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(dx, x_torch.grad.numpy(), **close)
    theirs = list(twin.parameters())
    for (name, value, gradient), other in zip(parameters(network), theirs, strict=True):
        assert value.shape == other.shape, name
        np.testing.assert_allclose(gradient, other.grad.numpy(), err_msg=name, **close)

    network.eval()
    twin.eval()
    np.testing.assert_allclose(network.forward(x), twin(x_torch).detach().numpy(), **close)
