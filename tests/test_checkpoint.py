"""Saving and loading several objects: the round trip, and files that are not as they should be."""

import json
import os
import re
import stat
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from support import BFLOAT16, python

import fastbn
from fastbn import BatchNorm, optim
from fastbn.demo.network import mlp, resnet

safetensors = pytest.importorskip("safetensors")
stored = pytest.importorskip("safetensors.numpy")

OPTIMIZERS = {
    "sgd": lambda layers: optim.SGD(layers, 0.1),
    "nesterov": lambda layers: optim.SGD(layers, 0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda layers: optim.RMSprop(layers, momentum=0.5, weight_decay=0.1),
    "adam": lambda layers: optim.Adam(layers, lr=1 / 3, betas=(0.8, 0.95)),
    "adamw": optim.AdamW,
}


class Box:
    """An object with any state, which loads whatever it is given."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


class Stubborn(Box):
    """Refuses all states but its first, and changes something before."""

    def __init__(self, error):
        super().__init__(x=1)
        self.error = error

    def load_state_dict(self, state):
        self.state = state if state == {"x": 1} else {}
        if not self.state:
            raise self.error


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def trained(rng, make=OPTIMIZERS["adam"], steps=2, **options):
    bn = BatchNorm(4, **options)
    optimizer = make(bn)
    for x in rng.standard_normal((steps, 8, 4)):
        bn.backward(bn(x) * x)
        optimizer.step()
    return {"bn": bn, "optimizer": optimizer}


def states(objects):
    return {name: deepcopy(each.state_dict()) for name, each in objects.items()}


def assert_same(one, other):
    """Assert that two states are the same to the bit, types included."""
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], dict):
            assert_same(one[name], other[name])
            continue
        assert type(one[name]) is type(other[name]), name
        if isinstance(one[name], np.ndarray):
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        else:
            assert one[name] == other[name], name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"affine": True, "dtype": np.float64, "momentum": None}])
def test_layers_and_optimizers_come_back_to_the_bit(make, options, rng, path):
    objects = trained(rng, make, **options)
    wanted = states(objects)
    fastbn.save(path, objects)
    others = trained(rng, make, steps=1, **options)
    fastbn.load(path, others)
    assert_same(states(others), wanted)
    x = rng.standard_normal((8, 4))
    for each in (objects, others):  # and they go on in the same way
        each["bn"].backward(each["bn"](x))
        each["optimizer"].step()
    assert_same(states(others), states(objects))


def test_hyper_parameters_come_back(rng, path):
    objects = trained(rng, OPTIMIZERS["nesterov"])
    objects["optimizer"].lr = 0.1 + 0.2
    fastbn.save(path, objects)
    objects["optimizer"].lr, objects["optimizer"].nesterov = 1, False
    fastbn.load(path, objects)
    optimizer = objects["optimizer"]
    assert (optimizer.lr, optimizer.momentum, optimizer.nesterov) == (0.1 + 0.2, 0.9, True)


@pytest.mark.parametrize("build", [mlp, resnet])
def test_networks_come_back_to_the_bit(build, rng, path):
    one, other = (build([1, 4, 3, 2], norm="batch", rng=rng) for _ in range(2))
    one.forward(rng.standard_normal((5, 1, *(() if build is mlp else (4, 4)))))
    fastbn.save(path, {"network": one})
    fastbn.load(path, {"network": other})
    assert_same(other.state_dict(), one.state_dict())


def test_any_tool_can_read_the_arrays(rng, path):
    objects = trained(rng)
    fastbn.save(path, objects)
    tensors = stored.load_file(path)
    np.testing.assert_array_equal(tensors["bn.weight"], objects["bn"].gamma)
    np.testing.assert_array_equal(
        tensors["optimizer.0.beta.m"], objects["optimizer"]._state["0.beta.m"]
    )
    assert not any(entry.startswith("optimizer.lr") for entry in tensors)


def test_a_file_of_another_tool_is_read(rng, path):
    bn = trained(rng)["bn"]
    state = {f"bn.{key}": value for key, value in bn.state_dict().items()}
    stored.save_file(state, path, {"format": "pt"})
    other = BatchNorm(4)
    fastbn.load(path, {"bn": other})
    assert_same(other.state_dict(), bn.state_dict())


def test_a_file_of_torch_is_read(path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    layer = torch.nn.BatchNorm1d(4)
    layer(torch.arange(20.0).reshape(5, 4))
    safetensors.torch.save_file({f"bn.{k}": v for k, v in layer.state_dict().items()}, path)
    bn = BatchNorm(4)
    fastbn.load(path, {"bn": bn})
    np.testing.assert_array_equal(bn.running_var, layer.running_var.numpy())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f2", ">i4", "u1", "?", ">u8"])
def test_memory_and_byte_order_do_not_matter(dtype, order, path):
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 5, dtype, order=order)
    for value in (array, array[:, ::2], array[1, 1, 1]):
        fastbn.save(path, {"a": Box(value=value)})
        box = Box()
        fastbn.load(path, {"a": box})
        assert box.state["value"].dtype == np.dtype(dtype).newbyteorder("=")
        assert box.state["value"].shape == value.shape
        np.testing.assert_array_equal(box.state["value"], value)


def test_an_optimizer_of_arrays_in_fortran_order_comes_back(rng, path):
    class Layer:
        def __init__(self, value):
            self.params = {"W": np.asfortranarray(value)}
            self.grads = {"W": np.ones_like(self.params["W"])}

    optimizers = [optim.Adam(Layer(rng.standard_normal((3, 4)))) for _ in range(2)]
    optimizers[0].step()
    fastbn.save(path, {"o": optimizers[0]})
    fastbn.load(path, {"o": optimizers[1]})
    assert_same(optimizers[1].state_dict(), optimizers[0].state_dict())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NUMBERS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
PLAIN = st.recursive(NUMBERS, lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=5)
DTYPES = arrays_of.boolean_dtypes() | arrays_of.integer_dtypes(endianness="?")
DTYPES |= arrays_of.unsigned_integer_dtypes(endianness="?")
DTYPES |= arrays_of.floating_dtypes(endianness="?", sizes=(16, 32, 64))
ARRAYS = arrays_of.arrays(DTYPES, arrays_of.array_shapes(min_dims=0, min_side=0, max_side=3))
NAMES = TEXT.filter(lambda name: name and "." not in name)
STATES = st.dictionaries(NAMES, st.dictionaries(TEXT, ARRAYS | PLAIN, max_size=3), max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states=STATES)
def test_any_state_comes_back(states, path):
    boxes = {name: Box() for name in states}
    for name, state in states.items():
        boxes[name].state = state
    fastbn.save(path, boxes)
    content = path.read_bytes()
    fastbn.save(path, boxes)
    assert path.read_bytes() == content  # the same states, the same bytes
    others = {name: Box() for name in states}
    fastbn.load(path, others)
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, np.ndarray):
                state[key] = value.astype(value.dtype.newbyteorder("="))
        assert_same(others[name].state, state)


def outcome(path, objects):
    """Load; return the states then, after an error those before."""
    before = states(objects)
    try:
        fastbn.load(path, objects)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert_same(states(objects), before)
        return None
    return states(objects)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the bytes of a file and what it holds."""
    path = tmp_path_factory.mktemp("whole") / "run.safetensors"
    objects = trained(np.random.default_rng(1))
    fastbn.save(path, objects)
    return path.read_bytes(), states(objects)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_byte_is_an_error_or_changes_nothing(data, whole, path):
    content, wanted = bytearray(whole[0]), whole[1]
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    loaded = outcome(path, trained(np.random.default_rng(2)))
    if loaded is not None:
        assert_same(loaded, wanted)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_part_of_a_file_is_an_error(data, whole, path):
    content = whole[0]
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert outcome(path, trained(np.random.default_rng(2))) is None
    path.write_bytes(content + data.draw(st.binary(min_size=1)))
    assert outcome(path, trained(np.random.default_rng(2))) is None


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary() | PLAIN.map(lambda value: json.dumps(value).encode()), body=st.binary())
def test_bytes_of_any_kind_are_an_error(header, body, path):
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    assert outcome(path, trained(np.random.default_rng(2))) is None


def with_header(header, body=b""):
    """Return the bytes of a file with this header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def with_metadata(**metadata):
    return stored.save({"a.x": np.zeros(2)}, metadata)


HOSTILE = {
    "empty": (b"", "no safetensors file, or damaged"),
    "an npz file": (b"PK\x03\x04" + bytes(100), "no safetensors file, or damaged"),
    "a huge header": (b"\xff" * 7 + b"\x00{}", "no safetensors file, or damaged"),
    "overflow": (
        with_header({"a.x": {"dtype": "U8", "shape": [2**63, 2], "data_offsets": [0, 1]}}, b"1"),
        "no safetensors file, or damaged",
    ),
    "65 dimensions": (
        with_header({"a.x": {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]}}, b"1"),
        "no safetensors file, or damaged",
    ),
    "a part of bfloat16": (
        with_header({"a.x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1]}}, b"1"),
        "no safetensors file, or damaged",
    ),
    "float8": (
        with_header({"a.x": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, b"1"),
        "no safetensors file, or damaged",
    ),
    "no JSON": (with_metadata(fastbn="x"), "damaged"),
    "deep JSON": (with_metadata(fastbn="[" * 10**6), "damaged"),
    "a list": (with_metadata(fastbn="[]"), "damaged"),
    "no values": (with_metadata(fastbn='{"crc32": "00000000"}'), "damaged: 'values'"),
    "values in a list": (with_metadata(fastbn='{"values": [], "crc32": "0"}'), "damaged"),
    "a wrong sum": (
        with_metadata(fastbn='{"values": {}, "crc32": "0"}'),
        "damaged: the checksum is another",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, path):
    content, message = HOSTILE[name]
    path.write_bytes(content)
    box = Box(x=1)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
        fastbn.load(path, {"a": box})
    assert box.state == {"x": 1}


@pytest.mark.skipif(BFLOAT16 is None, reason="bfloat16 needs ml_dtypes, which is not installed")
def test_bfloat16_comes_back_to_the_bit(rng, path):
    for values in (rng.standard_normal((4, 3)), np.array(1.5), np.zeros((0, 2))):
        box, read = Box(x=values.astype(BFLOAT16), n=1), Box()
        fastbn.save(path, {"a": box})
        fastbn.load(path, {"a": read})
        assert read.state["x"].dtype == BFLOAT16
        np.testing.assert_array_equal(read.state["x"], box.state["x"])
        assert read.state["n"] == 1


@pytest.mark.skipif(BFLOAT16 is None, reason="bfloat16 needs ml_dtypes, which is not installed")
def test_a_layer_takes_a_bfloat16_file(rng, path, monkeypatch):
    bn, state = BatchNorm(3), BatchNorm(3).state_dict()
    state["weight"] = rng.standard_normal(3).astype(BFLOAT16)
    # As other tools write it: PyTorch's state of a module in bfloat16.
    path.write_bytes(stored.save({f"bn.{name}": np.asarray(v) for name, v in state.items()}))
    fastbn.load(path, {"bn": bn})
    np.testing.assert_array_equal(bn.gamma, state["weight"].astype(np.float32))
    bn.gamma = [7, 8, 9]
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"bn\.weight is bfloat16; .*: pip install ml_dtypes"):
        fastbn.load(path, {"bn": bn})
    np.testing.assert_array_equal(bn.gamma, [7, 8, 9])


def test_a_masked_array_is_not_saved(path):
    with pytest.raises(TypeError, match=r"a\.x: expected an array without a mask"):
        fastbn.save(path, {"a": Box(x=np.ma.ones(3))})
    assert not path.exists()


def test_a_pickle_is_not_run(path):
    path.write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit'\ntR.")
    assert outcome(path, {"a": Box(x=1)}) is None


def test_a_folder_a_device_and_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        fastbn.load(tmp_path / "none.safetensors", {"a": Box()})
    for place in [tmp_path, *([Path("/dev/zero")] if Path("/dev/zero").exists() else [])]:
        with pytest.raises(
            ValueError, match=f"{place}: expected a safetensors file, got a folder or"
        ):
            fastbn.load(place, {"a": Box()})
        with pytest.raises(FileExistsError, match="expected a file, got a folder or a device"):
            fastbn.save(place, {"a": Box()})
        assert not place.is_file()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        fastbn.save(tmp_path / "none" / "run.safetensors", {"a": Box()})


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), RuntimeError("no")])
def test_what_was_loaded_is_taken_back_when_a_later_object_refuses(error, rng, path):
    fastbn.save(path, {**trained(rng), "last": Box(x=2)})
    objects = {**trained(rng), "last": Stubborn(error)}
    before = states(objects)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: last: '?no") as caught:
        fastbn.load(path, objects)
    assert caught.value.__cause__ is error
    assert_same(states(objects), before)


def test_an_object_that_notices_late_gets_its_state_back_too(rng, path):
    network = resnet([1, 4, 3, 2], norm="batch", rng=rng)
    state = {name: np.ones_like(value) for name, value in network.state_dict().items()}
    state["3.end.running_var"][1] = -1
    stored.save_file({f"network.{name}": value for name, value in state.items()}, path)
    before = states({"network": network})
    with pytest.raises(ValueError, match="network: running_var: expected values >= 0, got -1"):
        fastbn.load(path, {"network": network})
    assert_same(states({"network": network}), before)


def test_ctrl_c_takes_back_as_well(rng, path):
    fastbn.save(path, {**trained(rng), "last": Box(x=2)})
    objects = {**trained(rng), "last": Stubborn(KeyboardInterrupt())}
    before = states(objects)
    with pytest.raises(KeyboardInterrupt):
        fastbn.load(path, objects)
    assert_same(states(objects), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.pop("bn"), "expected entries of optimizer; unknown: bn."),
        (lambda o: o.update(more=BatchNorm(2)), "more: state: expected the entries weight, bias"),
        (lambda o: o.update(bn=BatchNorm(5)), r"bn: weight: expected shape \(5,\), got \(4,\)"),
        (lambda o: o.update(bn=BatchNorm(4, affine=False)), "bn: state: .* unknown: bias, weight"),
        (
            lambda o: o.update(optimizer=optim.SGD(o["bn"], 1)),
            "optimizer: state: expected other keys",
        ),
        (lambda o: o.clear(), "expected entries of nothing; unknown: "),
    ],
)
def test_objects_that_do_not_fit_the_file(change, message, rng, path):
    fastbn.save(path, trained(rng))
    objects = trained(rng)
    change(objects)
    before = states(objects)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
        fastbn.load(path, objects)
    assert_same(states(objects), before)


def test_a_foreign_file_of_many_entries_gives_a_short_message(path):
    stored.save_file({f"layer.{i:03}": np.zeros(1) for i in range(200)}, path)
    with pytest.raises(ValueError, match=r"unknown: layer\.000, .* and more") as caught:
        fastbn.load(path, {"bn": BatchNorm(2)})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        ([BatchNorm(2)], TypeError, "objects: expected a mapping, got list"),
        ({1: BatchNorm(2)}, TypeError,
         "objects: expected names, text of one letter or more, got 1"),
        ({"": BatchNorm(2)}, TypeError,
         "objects: expected names, text of one letter or more, got ''"),
        ({"a": 5}, TypeError, "objects['a']: expected state_dict and load_state_dict, got int"),
        ({"a.b": BatchNorm(2), "a": BatchNorm(2)}, ValueError,
         "objects: expected names that differ, got 'a' and 'a.b'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [fastbn.save, fastbn.load])
def test_objects_that_cannot_be(function, objects, error, message, path):
    path.write_bytes(b"old")
    with pytest.raises(error, match=re.escape(message)):
        function(path, objects)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": np.array(["a"])}, "a.x: expected booleans, .* got <U1"),
        ({"x": np.array([print])}, "a.x: expected booleans, .* got object"),
        ({"x": np.zeros(2, np.complex128)}, "a.x: expected booleans, .* got complex128"),
        ({"x": print}, "a.x: expected an array, number, text, list or dict, got <built-in"),
        ({"x": {1: 2}}, r"a.x: expected an array, number, text, list or dict, got \{1: 2\}"),
        ({"x": [{"y": (1, {2})}]}, r"a.x\[0\]\['y'\]\[1\]: expected an array, .* got \{2\}"),
        ({3: 4}, r"objects\['a'\]: expected a state_dict with names, got \{3: 4\}"),
        ([1], r"objects\['a'\]: expected a state_dict with names, got \[1\]"),
    ],
)
def test_a_state_that_cannot_be_saved(state, message, path):
    path.write_bytes(b"old")
    box = Box()
    box.state_dict = lambda: state
    with pytest.raises(TypeError, match=message):
        fastbn.save(path, {"a": box})
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("function", [fastbn.save, fastbn.load])
def test_a_path_that_is_none(function):
    with pytest.raises(TypeError, match="path: expected a path, got int"):
        function(3, {})


def test_names_may_have_dots_and_be_alike(path):
    boxes = {name: Box(x=n) for n, name in enumerate(["a.b", "a.bc", "ab", "a.c.d"])}
    fastbn.save(path, boxes)
    others = {name: Box() for name in boxes}
    fastbn.load(path, others)
    assert states(others) == states(boxes)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_file_and_no_other(failure, path, monkeypatch):
    path.write_bytes(b"old")

    def fail(_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        fastbn.save(path, {"a": Box(x=1)})
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_new_file_has_the_usual_permissions(path):
    before = os.umask(0o022)
    try:
        fastbn.save(path, {"a": Box(x=1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_without_safetensors_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for function in (fastbn.save, fastbn.load):
        with pytest.raises(ImportError, match=r'safetensors .*: pip install "fastbn\[io\]"'):
            function(path, {"a": Box()})
    assert not path.exists()


def test_importing_fastbn_does_not_import_safetensors():
    done = python("import sys, fastbn; assert 'safetensors' not in sys.modules")
    assert done.returncode == 0, done.stderr
