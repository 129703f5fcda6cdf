"""Agreement with PyTorch and with the ONNX operator, where they are installed."""

import numpy as np
import pytest
from support import assert_close

import fastbn

SHAPES = [(7,), (6, 5), (4, 3, 9), (3, 4, 5, 6), (2, 3, 4, 2, 3)]
CASES = [
    (shape, axis, dtype)
    for shape in SHAPES
    for axis in range(len(shape))
    for dtype in (np.float32, np.float64)
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def assert_agrees(actual, wanted, dtype, factor=1):
    """Assert agreement with a peer that keeps its sums in the dtype of the elements."""
    wanted = np.asarray(wanted, dtype=np.float64)
    scale = factor * (np.abs(wanted).max() + 1)
    assert_close(np.asarray(actual, dtype=np.float64), wanted, dtype, scale=4 * scale)


@pytest.mark.parametrize(("shape", "axis", "dtype"), CASES)
def test_functions_and_layer_agree_with_torch(torch, rng, shape, axis, dtype):
    if np.prod(shape) == shape[axis]:
        pytest.skip("torch refuses one value per channel, as the layer does")
    channels = shape[axis]
    x, dy = (2 + 3 * rng.standard_normal((2, *shape))).astype(dtype)
    gamma, beta = rng.standard_normal((2, channels)).astype(dtype)

    tx = torch.tensor(np.moveaxis(x, axis, 1), requires_grad=True)
    kind = torch.float32 if dtype == np.float32 else torch.float64
    layer = torch.nn.BatchNorm1d(channels, momentum=0.3, dtype=kind)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(gamma))
        layer.bias.copy_(torch.tensor(beta))
    bn = fastbn.BatchNorm(channels, axis=axis, momentum=0.3, dtype=dtype)
    bn.load_state_dict(layer.state_dict())
    tdy = torch.tensor(np.moveaxis(dy, axis, 1))
    for mode in (True, False):
        layer.train(mode)
        bn.train(mode)
        tx.grad = layer.weight.grad = layer.bias.grad = None
        flat = tx.reshape(tx.shape[0], channels, -1)
        ty = layer(flat).reshape(tx.shape)
        ty.backward(tdy)
        y = bn(x)
        dx = bn.backward(dy)
        # Torch's gradients cancel large sums in the dtype of x: an error of some eps of dy * rstd.
        others = tuple(i for i in range(x.ndim) if i != axis)
        rstd = 1 / np.sqrt(x.var(others).min() if mode else layer.running_var.min().item())
        assert_agrees(np.moveaxis(y, axis, 1), ty.detach().numpy(), dtype, 1 + rstd)
        assert_agrees(np.moveaxis(dx, axis, 1), tx.grad.numpy(), dtype, 8 * (1 + rstd))
        assert_agrees(bn.grads["gamma"], layer.weight.grad.numpy(), dtype, 8)
        assert_agrees(bn.grads["beta"], layer.bias.grad.numpy(), dtype)
        assert_agrees(bn.running_mean, layer.running_mean.numpy(), dtype)
        assert_agrees(bn.running_var, layer.running_var.numpy(), dtype)
        assert bn.num_batches_tracked == layer.num_batches_tracked.item() == 1


def test_a_torch_state_dict_is_loaded_as_it_is(torch, rng):
    layer = torch.nn.BatchNorm2d(3)
    layer(torch.tensor(rng.standard_normal((4, 3, 5, 5)), dtype=torch.float32))
    bn = fastbn.BatchNorm(3)
    bn.load_state_dict(layer.state_dict())
    assert bn.num_batches_tracked == 1
    np.testing.assert_array_equal(bn.running_var, layer.running_var.numpy())
    layer.load_state_dict({k: torch.tensor(v) for k, v in bn.state_dict().items()})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 9), (3, 4, 5, 6), (2, 3, 4, 2, 3)])
def test_agrees_with_the_onnx_operator(rng, shape, training):
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    outputs = ["y", "m", "v"] if training else ["y"]
    node = helper.make_node(
        "BatchNormalization", ["x", "scale", "b", "mean", "var"], outputs,
        epsilon=1e-3, momentum=0.9, training_mode=int(training),
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, floats, None) for n in node.input],
        [helper.make_tensor_value_info(n, floats, None) for n in outputs],
    )  # fmt: skip
    x = rng.standard_normal(shape).astype(np.float32)
    scale, b, mean = rng.standard_normal((3, shape[1])).astype(np.float32)
    var = rng.random(shape[1]).astype(np.float32)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    inputs = {"x": x, "scale": scale, "b": b, "mean": mean, "var": var}
    y, *running = evaluator(model).run(None, inputs)

    # ONNX's momentum is the weight of the old value, and its running variance is biased.
    bn = fastbn.BatchNorm(shape[1], eps=1e-3, momentum=1 - 0.9)
    bn.gamma, bn.beta = scale, b
    bn.running_mean[:], bn.running_var[:] = mean, var
    assert_agrees(bn.train(training)(x), y, np.float32, 4)
    if training:
        count = x.size // shape[1]
        biased = 0.9 * var + (bn.running_var - 0.9 * var) * (count - 1) / count
        assert_agrees(bn.running_mean, running[0], np.float32)
        assert_agrees(biased, running[1], np.float32)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(16, 5), (4, 3, 9), (6, 7, 5, 5)])
def test_fused_layers_agree_with_autograd(torch, rng, shape, activation):
    x, residual, dy = rng.standard_normal((3, *shape))
    bn = fastbn.BatchNorm(shape[1], activation=activation, dtype=np.float64)
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, shape[1]))
    tx, tr, gamma, beta = (
        torch.tensor(a, requires_grad=True) for a in (x, residual, bn.gamma, bn.beta)
    )
    a = torch.nn.functional.batch_norm(tx, None, None, gamma, beta, training=True) + tr
    ty = getattr(torch.nn.functional, activation)(a)
    ty.backward(torch.tensor(dy))
    np.testing.assert_allclose(bn(x, residual=residual), ty.detach().numpy(), atol=1e-12)
    dx, dresidual = bn.backward(dy)
    for actual, wanted in (
        (dx, tx), (dresidual, tr), (bn.grads["gamma"], gamma), (bn.grads["beta"], beta)
    ):  # fmt: skip
        np.testing.assert_allclose(actual, wanted.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 9), (6, 7, 5, 5)])
def test_instance_norm_agrees_with_torch(torch, rng, shape, track, training):
    x, dy = 3 + rng.standard_normal((2, *shape))
    kind = torch.nn.InstanceNorm1d if len(shape) == 3 else torch.nn.InstanceNorm2d
    theirs = kind(shape[1], affine=True, track_running_stats=track, dtype=torch.float64)
    ours = fastbn.InstanceNorm(shape[1], affine=True, track_running_stats=track, dtype=np.float64)
    ours.gamma[:], ours.beta[:] = rng.standard_normal((2, shape[1]))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(ours.gamma))
        theirs.bias.copy_(torch.tensor(ours.beta))
    for mode in (True, training):
        theirs.train(mode)
        tx = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        ty = theirs(tx)
        ty.backward(torch.tensor(dy))
        np.testing.assert_allclose(ours.train(mode)(x), ty.detach().numpy(), atol=1e-12)
        np.testing.assert_allclose(ours.backward(dy), tx.grad.numpy(), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(ours.grads["gamma"], theirs.weight.grad.numpy(), atol=1e-11)
        if track:
            np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), rtol=1e-12)
            np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), rtol=1e-12)


def test_masks_agree_with_torch_on_selected_rows(torch, rng):
    x, dy = rng.standard_normal((2, 6, 20, 5))
    mask = rng.random((6, 20)) < 0.6
    y, cache = fastbn.batch_norm(x, axis=-1, mask=mask, activation="relu")
    dx, *_ = fastbn.batch_norm_backward(dy, cache)
    rows = torch.tensor(x[mask], requires_grad=True)
    wanted = torch.relu(torch.nn.functional.batch_norm(rows, None, None, training=True))
    wanted.backward(torch.tensor(dy[mask]))
    np.testing.assert_allclose(y[mask], wanted.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(dx[mask], rows.grad.numpy(), atol=1e-12)
