"""The layer as an object: its arguments, state, copies and text."""

import copy
import pickle
import re

import numpy as np
import pytest
from layer_cases import assert_unchanged, snapshot
from support import BFLOAT16

from fastbn import BatchNorm, InstanceNorm


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features: expected an integer >= 1, got 0"),
        ({"num_features": 2.5}, TypeError, "num_features: expected an integer, got float"),
        ({"axis": "1"}, TypeError, "axis: expected an integer, got str"),
        ({"eps": -1}, ValueError, "eps: expected a finite number >= 0, got -1"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0, got nan"),
        ({"eps": "a"}, TypeError, "eps: expected a number, got str"),
        ({"momentum": 1.5}, ValueError, "momentum: expected None or a number from 0 to 1, got 1.5"),
        ({"momentum": -0.1}, ValueError, "momentum: expected None or a number from 0 to 1"),
        ({"momentum": "0.1"}, TypeError, "momentum: expected a number, got str"),
        ({"momentum": "a"}, TypeError, "momentum: expected a number, got str"),
        ({"dtype": np.float16}, TypeError, "dtype: expected float32 or float64, got float16"),
        ({"dtype": ">f4"}, TypeError, "dtype: expected float32 or float64, got >f4"),
        ({"dtype": "x"}, TypeError, "dtype: expected float32 or float64, got 'x'"),
        ({"dtype": None}, TypeError, "dtype: expected float32 or float64, got None"),
        ({"momentum": 10**400}, ValueError, "momentum: expected a finite number, got one beyond"),
    ],
)
def test_bad_constructor_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BatchNorm(**{"num_features": 3, **arguments})


def trained(rng, **options):
    bn = BatchNorm(3, **options)
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, 3))
    bn(rng.standard_normal((6, 3)))
    return bn


def test_state_dict_goes_round(rng):
    bn = trained(rng)
    state = bn.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"] == 1
    other = BatchNorm(3)
    arrays = dict(other.params)
    other.load_state_dict(state)
    assert all(other.params[name] is array for name, array in arrays.items())
    assert_unchanged(other, snapshot(bn))
    state["weight"][:] = 9
    state["running_mean"][:] = 9
    assert not (bn.gamma == 9).any()
    assert not (other.running_mean == 9).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, "missing: weight, unknown: none"),
        ({"gamma": np.ones(3)}, ValueError, "missing: none, unknown: gamma"),
        ({"bias": np.ones(4)}, ValueError, "bias: expected shape (3,), got (4,)"),
        ({"bias": ["a", "b", "c"]}, TypeError, "bias: expected numbers, got dtype <U1"),
        ({"bias": [[1], [1, 2]]}, ValueError, "bias: expected an array_like of numbers, got"),
        ({"running_var": np.ones((3, 1))}, ValueError, "running_var: expected shape (3,), got"),
        ({"running_var": [1, -1, 1]}, ValueError, "running_var: expected values >= 0, got -1"),
        (
            {"num_batches_tracked": 1.5},
            ValueError,
            "num_batches_tracked: expected one integer >= 0",
        ),
        ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked: expected one integer >= 0"),
        (
            {"num_batches_tracked": [1]},
            ValueError,
            "num_batches_tracked: expected one integer >= 0",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(rng, change, error, message):
    state = {**trained(rng).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    bn = trained(rng)
    before = snapshot(bn)
    with pytest.raises(error, match=re.escape(message)):
        bn.load_state_dict(state)
    assert_unchanged(bn, before)


def test_masked_arrays_do_not_lose_their_mask_in_silence(rng):
    bn = trained(rng)
    before = snapshot(bn)
    masked = np.ma.masked_array(np.ones(3), [True, False, False])
    words = "expected an array without a mask, got a masked array"
    for name in bn.state_dict():
        with pytest.raises(TypeError, match=f"{name}: {words}"):
            bn.load_state_dict({**bn.state_dict(), name: masked})
    with pytest.raises(TypeError, match=f"gamma: {words}"):
        bn.gamma = masked
    with pytest.raises(TypeError, match=f"mask: {words}"):
        bn(np.ones((6, 3)), mask=np.ma.ones(6, bool))
    with pytest.raises(TypeError, match=f"weight: {words}"):
        bn.fold_into(np.ma.ones((3, 3)))
    with pytest.raises(TypeError, match=f"bias: {words}"):
        bn.fold_into(np.ones((3, 3)), masked)
    assert_unchanged(bn, before)


class Tensor:
    """A bfloat16 tensor as PyTorch has it: NumPy cannot read it."""

    dtype = "torch.bfloat16"

    def __init__(self, values):
        self.values = values

    def float(self):
        return self.values.astype(np.float32)

    def __array__(self, *_, **__):
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.skipif(BFLOAT16 is None, reason="bfloat16 needs ml_dtypes, which is not installed")
@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_bfloat16_is_taken_exactly(rng, wrap):
    state = trained(rng).state_dict()
    short = {name: state[name].astype(BFLOAT16) for name in list(state)[:4]}
    bn, other = BatchNorm(3), BatchNorm(3)
    bn.load_state_dict({**state, **{name: wrap(values) for name, values in short.items()}})
    for name, values in short.items():
        np.testing.assert_array_equal(bn.state_dict()[name], values.astype(np.float64))
    other.gamma, other.beta = wrap(short["weight"]), wrap(short["bias"])
    np.testing.assert_array_equal(other.gamma, bn.gamma)
    np.testing.assert_array_equal(other.beta, bn.beta)
    with pytest.raises(ValueError, match=r"gamma: expected shape \(3,\), got \(2,\)"):
        bn.gamma = wrap(short["weight"][:2])
    with pytest.raises(ValueError, match="running_var: expected values >= 0, got -"):
        bn.load_state_dict({**state, "running_var": wrap(-short["running_var"])})


def test_bfloat16_states_of_torch_are_taken(rng):
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(3)
    module(torch.tensor(rng.standard_normal((6, 3)), dtype=torch.float32))
    module = module.to(torch.bfloat16)
    bn = BatchNorm(3)
    bn.load_state_dict(module.state_dict())
    for name, values in module.state_dict().items():
        np.testing.assert_array_equal(bn.state_dict()[name], values.double().numpy())


def frozen(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("spoil", [lambda a: a[:, None], frozen, np.ndarray.tolist, np.int64])
def test_a_layer_whose_arrays_cannot_take_a_state_is_left_whole(rng, spoil):
    bn = trained(rng)
    bn.params["beta"] = spoil(np.arange(3.0))
    before = snapshot(bn)
    state = {**trained(rng).state_dict(), "num_batches_tracked": 7}
    message = "bias: expected the layer to have a writeable array of floats of shape (3,), got "
    with pytest.raises(ValueError, match=re.escape(message)):
        bn.load_state_dict(state)
    assert_unchanged(bn, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_have_the_state_but_neither_hooks_nor_minibatch(rng, duplicate):
    bn = trained(rng, momentum=None, eps=1e-3)
    bn.register_grad_hook(lambda layer: None)
    bn.eval()
    twin = duplicate(bn)
    assert repr(twin) == repr(bn)
    assert not twin.training
    assert_unchanged(twin, snapshot(bn))
    with pytest.raises(RuntimeError, match="no forward pass"):
        twin.backward(np.ones((6, 3)))
    twin.gamma[:] = 9
    assert not (bn.gamma == 9).any()
    twin.train()(rng.standard_normal((6, 3)))
    assert (twin.num_batches_tracked, bn.num_batches_tracked) == (2, 1)


def test_a_state_may_come_from_the_layer_itself(rng):
    bn = trained(rng)
    gamma, beta = bn.gamma.copy(), bn.beta.copy()
    bn.load_state_dict({**bn.state_dict(), "weight": bn.beta, "bias": bn.gamma})
    np.testing.assert_array_equal(bn.gamma, beta)
    np.testing.assert_array_equal(bn.beta, gamma)


def test_repr_tells_how_to_make_the_layer():
    bn = BatchNorm(3, axis=-1, momentum=None, dtype=np.float64, virtual_batch_size=4)
    assert repr(bn) == (
        "BatchNorm(3, axis=-1, eps=1e-05, momentum=None, affine=True, "
        "track_running_stats=True, dtype=float64, activation=None, virtual_batch_size=4)"
    )
    assert repr(InstanceNorm(3, activation="relu")) == (
        "InstanceNorm(3, axis=1, eps=1e-05, momentum=0.1, affine=False, "
        "track_running_stats=False, dtype=float32, activation='relu')"
    )
