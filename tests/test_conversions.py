"""The layer as others have it: folded into the map before it, from Keras, from ONNX."""

import re

import numpy as np
import pytest
from support import BFLOAT16, Wide, assert_close

from fastbn import BatchNorm
from fastbn.demo.layers import Conv2d


def trained(rng, channels=5, **options):
    """Return a layer with values of its own everywhere, in evaluation."""
    bn = BatchNorm(channels, **options)
    for x in 3 + 2 * rng.standard_normal((4, 20, channels)):
        bn(x if bn.axis else x.T)
    for name in bn.params:
        bn.params[name][:] = rng.standard_normal(channels)
    return bn.eval()


def exact(bn, z, axis):
    """Return what the layer makes of z in evaluation, as Wide."""
    columns = [1] * np.ndim(z)
    columns[axis] = -1
    mean, var, gamma, beta = (
        Wide(np.reshape(values, columns))
        for values in (
            bn.running_mean, bn.running_var, bn.params.get("gamma", np.ones(bn.num_features)),
            bn.params.get("beta", np.zeros(bn.num_features)),
        )
    )  # fmt: skip
    return (z - mean) / (var + bn.eps).sqrt() * gamma + beta


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_folded_map_is_the_map_and_the_layer(axis, dtype, biased, affine, rng):
    bn = trained(rng, dtype=dtype, affine=affine)
    x = rng.standard_normal((50, 8)).astype(dtype)
    weight = rng.standard_normal((8, 5) if axis else (5, 8)).astype(dtype)
    bias = rng.standard_normal(5).astype(dtype) if biased else None
    folded, shift = bn.fold_into(weight, bias, axis=axis)
    assert folded.dtype == shift.dtype == dtype
    assert (folded.shape, shift.shape) == (weight.shape, (5,))
    if not axis:
        weight, folded = weight.T, folded.T

    # Rounded once: each weight, and the bias, are off by half an eps of themselves at most.
    z = Wide(x) @ Wide(weight) + (bias if biased else 0)
    wanted = exact(bn, z, axis=1)
    size = np.abs(x).astype(np.float64) @ np.abs(folded) + np.abs(shift)
    half = np.finfo(dtype).eps / 2
    # In float64 the few operations before that rounding count as much as it does.
    allowed = half * size * (1.001 if dtype == np.float32 else 8)
    assert (np.abs((Wide(x) @ Wide(folded) + shift - wanted).high) <= allowed).all()

    # As computed, both ways: a sum of 8 products, and the layer's 2 eps.
    y, y_folded = bn(x @ weight + (bias if biased else 0)), x @ folded + shift
    scale = np.abs(bn.params.get("gamma", 1)) / np.sqrt(bn.running_var + bn.eps)
    terms = (
        np.abs(x) @ np.abs(weight) + np.abs(bn.running_mean) + np.abs(bias if biased else 0)
    ) * scale
    assert (np.abs(y_folded - y) <= 2 * half * (10 * terms + 4 * np.abs(wanted.high).max())).all()


def test_results_are_rounded_once(rng):
    bn = trained(rng, 300)
    weight, bias = rng.standard_normal((300, 7), np.float32), rng.standard_normal(300, np.float32)
    folded, shift = bn.fold_into(weight, bias)
    scale = Wide(bn.gamma) / (Wide(bn.running_var) + bn.eps).sqrt()
    np.testing.assert_array_equal(folded, (weight * scale[:, None]).high.astype(np.float32))
    np.testing.assert_array_equal(shift, exact(bn, bias[None], 1).high[0].astype(np.float32))


def test_a_mean_far_from_zero_costs_no_digits(rng):
    bn = trained(rng, dtype=np.float32)
    bn.running_mean[:] = 1e6
    bias = np.full(5, 1e6 + 0.5, np.float32)
    _, shift = bn.fold_into(np.zeros((5, 3), np.float32), bias)
    assert_close(shift, exact(bn, bias[None], 1).high[0])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(stride, rng):
    conv = Conv2d(3, 5, stride=stride, bias=True, rng=rng, dtype=np.float64)
    conv.params["bias"][:] = rng.standard_normal(5)
    bn = trained(rng)
    x = rng.standard_normal((2, 3, 6, 7))
    wanted = bn(conv(x))
    conv.params["weight"], conv.params["bias"] = bn.fold_into(*conv.params.values())
    np.testing.assert_allclose(conv(x), wanted, rtol=1e-13, atol=1e-13)


def test_the_courses_columns(rng):
    bn = trained(rng, axis=0, dtype=np.float64)
    W, b, A = rng.standard_normal((5, 8)), rng.standard_normal((5, 1)), rng.standard_normal((8, 9))
    wanted = bn(W @ A + b)
    folded, shift = bn.fold_into(W, b)
    assert shift.shape == (5, 1)
    np.testing.assert_allclose(folded @ A + shift, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, ">f4"])
def test_weights_of_other_types(dtype, rng):
    bn = trained(rng)
    weight = rng.standard_normal((5, 3)).astype(dtype)
    folded, shift = bn.fold_into(weight)
    assert folded.dtype == shift.dtype == np.dtype(dtype)
    wide = bn.fold_into(weight.astype(np.float64))
    np.testing.assert_array_equal(folded, wide[0].astype(dtype))
    np.testing.assert_array_equal(shift, wide[1].astype(dtype))


def test_folding_changes_nothing(rng):
    bn = trained(rng).train()
    weight, bias = rng.standard_normal((5, 3)), rng.standard_normal(5)
    before = weight.copy(), bias.copy(), *bn.state_dict().values()
    bn.fold_into(weight, bias)
    for one, other in zip(before, (weight, bias, *bn.state_dict().values()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert bn.training


@pytest.mark.parametrize(
    ("weight", "bias", "axis", "error", "message"),
    [
        (
            np.ones((3, 5)),
            None,
            0,
            ValueError,
            "weight: expected 5 output channels on axis 0, got shape (3, 5)",
        ),
        (np.ones((5, 3)), None, 2, ValueError, "weight: expected 5 output channels on axis 2, got"),
        (
            np.ones(()),
            None,
            0,
            ValueError,
            "weight: expected 5 output channels on axis 0, got shape ()",
        ),
        (np.ones((5, 3)), None, 0.5, TypeError, "axis: expected an integer, got float"),
        (
            np.ones((5, 3), int),
            None,
            0,
            TypeError,
            "weight: expected float16, bfloat16, float32 or float64, got int",
        ),
        (
            np.ones((5, 3), complex),
            None,
            0,
            TypeError,
            "weight: expected float16, bfloat16, float32 or float64",
        ),
        (np.ones((5, 3)), np.ones(4), 0, ValueError, "bias: expected 5 values, got shape (4,)"),
        (np.ones((5, 3)), ["a"] * 5, 0, TypeError, "bias: expected numbers, got dtype <U1"),
    ],
)
def test_what_cannot_be_folded(weight, bias, axis, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BatchNorm(5).fold_into(weight, bias, axis=axis)


def test_without_running_statistics_nothing_can_be_folded():
    bn = BatchNorm(5, track_running_stats=False)
    with pytest.raises(
        RuntimeError, match="fold_into: expected running statistics, this layer was"
    ):
        bn.fold_into(np.ones((5, 3)))


GAMMA, BETA, MEAN, VAR = [2.0, 3.0], [0.5, -1.0], [1.0, 10.0], [3.0, 8.0]


def test_from_keras_by_hand():
    bn = BatchNorm.from_keras([GAMMA, BETA, MEAN, VAR], 0.75, 1.0)
    assert (bn.axis, bn.momentum, bn.eps) == (-1, 0.25, 1.0)
    assert bn.training
    assert bn.gamma.dtype == np.float32
    # (3 - 1) / sqrt(3 + 1) * 2 + 0.5 and (4 - 10) / sqrt(8 + 1) * 3 - 1
    np.testing.assert_allclose(bn.eval()(np.array([[[3.0, 4.0]]])), [[[2.5, -7.0]]], rtol=1e-15)
    # The minibatch has the mean 3 and 6, the unbiased variance 8 and 2.
    bn.train()(np.array([[1.0, 5.0], [5.0, 7.0]]))
    np.testing.assert_allclose(bn.running_mean, [0.75 * 1 + 0.25 * 3, 0.75 * 10 + 0.25 * 6])
    np.testing.assert_allclose(bn.running_var, [0.75 * 3 + 0.25 * 8, 0.75 * 8 + 0.25 * 2])


def test_from_keras_has_its_defaults():
    bn = BatchNorm.from_keras([GAMMA, BETA, MEAN, VAR])
    assert (bn.axis, bn.momentum, bn.eps) == (-1, 1 - 0.99, 1e-3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_from_keras_without_gamma_or_beta(scale, center):
    weights = [GAMMA] * scale + [BETA] * center + [MEAN, VAR]
    bn = BatchNorm.from_keras(weights, epsilon=1, scale=scale, center=center, dtype=np.float64)
    assert bn.affine == (scale or center)
    wanted = np.array([1.0, -2.0]) * (GAMMA if scale else 1) + (BETA if center else 0)
    np.testing.assert_allclose(bn.eval()(np.array([[3.0, 4.0]])), [wanted], rtol=1e-15)
    np.testing.assert_array_equal(bn.running_var, VAR)


def test_from_onnx_by_hand():
    bn = BatchNorm.from_onnx(GAMMA, BETA, MEAN, VAR, epsilon=1.0, momentum=0.75, dtype=np.float64)
    assert (bn.axis, bn.momentum, bn.eps, bn.dtype) == (1, 0.25, 1.0, np.float64)
    np.testing.assert_allclose(bn.eval()(np.array([[3.0, 4.0]])), [[2.5, -7.0]], rtol=1e-15)
    assert BatchNorm.from_onnx(GAMMA, BETA, MEAN, VAR).eps == 1e-5
    assert BatchNorm.from_onnx(GAMMA, BETA, MEAN, VAR).momentum == 1 - 0.9


def test_converted_layers_have_memory_of_their_own():
    arrays = [np.array(values, np.float32) for values in (GAMMA, BETA, MEAN, VAR)]
    bn = BatchNorm.from_onnx(*arrays)
    for array in arrays:
        array[:] = 9
    np.testing.assert_array_equal(bn.gamma, GAMMA)
    np.testing.assert_array_equal(bn.running_mean, MEAN)


ALL = [GAMMA, BETA, MEAN, VAR]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            [ALL[:3]],
            {},
            ValueError,
            "weights: expected 4 arrays, gamma, beta, moving_mean, moving_variance, got 3",
        ),
        (
            [ALL],
            {"scale": False},
            ValueError,
            "weights: expected 3 arrays, beta, moving_mean, moving_variance, got 4",
        ),
        ([5], {}, TypeError, "weights: expected a list of arrays, got int"),
        ([{"gamma": 1}], {}, TypeError, "weights: expected a list of arrays, got dict"),
        (
            [[[1.0], BETA, MEAN, VAR]],
            {},
            ValueError,
            "weights[0] (gamma): expected shape (2,), got (1,)",
        ),
        (
            [[GAMMA, ["a", "b"], MEAN, VAR]],
            {},
            TypeError,
            "weights[1] (beta): expected numbers, got dtype <U1",
        ),
        (
            [[GAMMA, BETA, [MEAN], VAR]],
            {},
            ValueError,
            "weights[2] (moving_mean): expected one value per channel, got shape (1, 2)",
        ),
        (
            [[[], [], [], []]],
            {},
            ValueError,
            "weights[2] (moving_mean): expected one value per channel, got shape (0,)",
        ),
        (
            [[GAMMA, BETA, MEAN, [1, -2]]],
            {},
            ValueError,
            "weights[3] (moving_variance): expected values >= 0, got -2",
        ),
        ([ALL], {"momentum": 1.5}, ValueError, "momentum: expected a number from 0 to 1, got 1.5"),
        ([ALL], {"momentum": None}, TypeError, "momentum: expected a number, got NoneType"),
        ([ALL], {"epsilon": -1}, ValueError, "epsilon: expected a finite number >= 0, got -1"),
        ([ALL], {"dtype": np.int32}, TypeError, "dtype: expected float32 or float64, got int32"),
    ],
)
def test_what_cannot_come_from_keras(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BatchNorm.from_keras(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": [1]}, ValueError, "scale: expected shape (2,), got (1,)"),
        ({"B": [1, 2, 3]}, ValueError, "B: expected shape (2,), got (3,)"),
        ({"mean": 5}, ValueError, "mean: expected one value per channel, got shape ()"),
        ({"var": [1, -2]}, ValueError, "var: expected values >= 0, got -2"),
        ({"epsilon": float("nan")}, ValueError, "epsilon: expected a finite number >= 0, got nan"),
        ({"momentum": "0.9"}, TypeError, "momentum: expected a number, got str"),
    ],
)
def test_what_cannot_come_from_onnx(change, error, message):
    arguments = {"scale": GAMMA, "B": BETA, "mean": MEAN, "var": VAR, **change}
    with pytest.raises(error, match=re.escape(message)):
        BatchNorm.from_onnx(**arguments)


@pytest.mark.skipif(BFLOAT16 is None, reason="bfloat16 needs ml_dtypes, which is not installed")
def test_bfloat16_is_taken(rng):
    given = [(1 + rng.random(3)).astype(BFLOAT16) for _ in range(4)]
    wide = [values.astype(np.float32) for values in given]
    weight = rng.standard_normal((3, 5)).astype(BFLOAT16)
    for make in (BatchNorm.from_keras, lambda arrays: BatchNorm.from_onnx(*arrays)):
        bn, wanted = make(given), make(wide)
        for name, values in wanted.state_dict().items():
            np.testing.assert_array_equal(bn.state_dict()[name], values)
        exact, shift = bn.fold_into(weight.astype(np.float64), given[0])
        folded, bias = bn.fold_into(weight, given[0])
        assert folded.dtype == bias.dtype == BFLOAT16
        np.testing.assert_array_equal(folded, exact.astype(BFLOAT16))
        np.testing.assert_array_equal(bias, shift.astype(BFLOAT16))


@pytest.mark.parametrize("name", ["scale", "B", "mean", "var"])
def test_masked_arrays_are_refused(name):
    arrays = {"scale": GAMMA, "B": BETA, "mean": MEAN, "var": VAR}
    arrays[name] = np.ma.masked_array(arrays[name], True)
    words = "expected an array without a mask, got a masked array"
    with pytest.raises(TypeError, match=f"{name}: {words}"):
        BatchNorm.from_onnx(**arrays)
    with pytest.raises(TypeError, match=words):
        BatchNorm.from_keras(list(arrays.values()))


@pytest.mark.filterwarnings("default::DeprecationWarning")  # they are Keras's own
@pytest.mark.parametrize("scale", [True, False])
def test_keras_agrees(scale, rng):
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization(momentum=0.8, epsilon=0.01, scale=scale)
    layer.build((None, 4, 3))
    layer.set_weights([0.5 + rng.random(3) for _ in layer.get_weights()])
    bn = BatchNorm.from_keras(layer.get_weights(), 0.8, 0.01, scale=scale)
    x = rng.standard_normal((5, 4, 3)).astype(np.float32)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(bn.eval()(x), keras.ops.convert_to_numpy(layer(x)), **close)
    before = bn.running_var.copy()
    np.testing.assert_allclose(
        bn.train()(x), keras.ops.convert_to_numpy(layer(x, training=True)), **close
    )
    np.testing.assert_allclose(bn.running_mean, layer.get_weights()[-2], **close)
    biased = 0.8 * before + (bn.running_var - 0.8 * before) * 19 / 20
    np.testing.assert_allclose(biased, layer.get_weights()[-1], **close)


def test_the_onnx_operator_agrees(rng):
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    node = onnx.helper.make_node(
        "BatchNormalization", ["x", "scale", "B", "mean", "var"], ["y"], epsilon=0.01
    )
    inputs = {name: (0.5 + rng.random(3)).astype(np.float32) for name in node.input[1:]}
    x = rng.standard_normal((5, 3, 4)).astype(np.float32)
    (y,) = evaluator(node).run(None, {"x": x, **inputs})
    bn = BatchNorm.from_onnx(**inputs, epsilon=0.01).eval()
    np.testing.assert_allclose(bn(x), y, rtol=1e-5, atol=1e-5)
