"""Several layers and optimizers in one safetensors file: whole or not at all, and no pickle.

Arrays are its tensors, under "name.key", for any tool to read. What else a state has, numbers of
an optimizer for instance, is JSON in its metadata, beside a checksum, which the format lacks.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.files import write_atomically

_METADATA = "fastbn"  # one key, as safetensors writes several in any order


class Stateful(Protocol):
    """What `save` and `load` ask of an object."""

    def state_dict(self) -> Mapping[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: Mapping[str, Any], /) -> object: ...  # noqa: D102


def save(path: str | os.PathLike[str], objects: Mapping[str, Stateful]) -> None:
    """Write the states of several objects into one safetensors file.

    At any time there is the old file or the new one, complete and on the disk.

    Parameters
    ----------
    path : path
        Where to write; a file that is there is replaced.
    objects : mapping of str to objects
        Anything with `state_dict` and `load_state_dict`: layers, optimizers, objects of one's own.
        A state maps names to arrays of booleans, integers, float16, bfloat16, float32 or float64,
        to NumPy's numbers, and to what JSON knows: numbers, text, True, False, None, lists and
        dicts. The entry `key` of the object `name` gets the name "name.key".

    Raises
    ------
    ImportError
        If safetensors is missing: ``pip install "fastbn[io]"``.
    TypeError, ValueError
        If `objects` or an entry of a state is not as described. Of two names none may be the
        other's beginning up to a dot ("net" and "net.bn"), as their entries could be the same.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, fastbn
    >>> bn = fastbn.BatchNorm(3)
    >>> adam = fastbn.optim.Adam(bn, lr=0.25)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fastbn.save(f"{folder}/run.safetensors", {"bn": bn, "adam": adam})
    ...     bn.gamma, adam.lr = [7, 8, 9], 0.125
    ...     fastbn.load(f"{folder}/run.safetensors", {"bn": bn, "adam": adam})
    >>> bn.gamma, adam.lr
    (array([1., 1., 1.], dtype=float32), 0.25)
    """
    target, numpy = _path(path), _safetensors().numpy
    tensors: dict[str, NDArray[Any]] = {}
    values: dict[str, Any] = {}
    for name, state in _states(objects).items():
        for key, value in state.items():
            entry = f"{name}.{key}"
            if isinstance(value, np.ndarray | np.generic):
                tensors[entry] = _tensor(entry, value)
            else:
                values[entry] = _plain(entry, value)
    about = {"crc32": _checksum(tensors, values), "values": values}
    content = numpy.save(tensors, {_METADATA: json.dumps(about)})
    write_atomically(target, lambda file: file.write(content))


def load(path: str | os.PathLike[str], objects: Mapping[str, Stateful]) -> None:
    """Have objects take over what `save` wrote, all of them or none.

    If one object refuses its part, those before it get back what they had. Tuples come as lists,
    NumPy's numbers as arrays of shape ().

    Parameters
    ----------
    path : path
        A file of `save`, or any safetensors file, such as one of PyTorch's state_dicts, that has
        just the entries that the objects want.
    objects : mapping of str to objects
        As for `save`, under the same names; all those of the file.

    Raises
    ------
    ImportError, TypeError, OSError
        As `save`, or if the file cannot be read, or has bfloat16 and ml_dtypes is missing.
    ValueError
        If `objects` is not as described, or the file is damaged, or no safetensors file, or has
        entries of no object, or an object refuses its entries, because one is missing, unknown or
        of a wrong shape or type. The text names the file, and no object is changed.
    """
    before = {name: deepcopy(state) for name, state in _states(objects).items()}
    states: dict[str, dict[str, Any]] = {name: {} for name in before}
    unknown = []
    for entry, value in _read(_path(path)).items():
        name = next((start for start in _starts(entry) if start in states), None)
        if name is None:
            unknown.append(entry)
        else:
            states[name][entry.removeprefix(f"{name}.")] = value
    if unknown:
        words = f"entries of {_some(states) or 'nothing'}"
        raise ValueError(f"{path}: expected {words}; unknown: {_some(unknown)}")
    with ExitStack() as undo:
        for name, state in states.items():
            try:
                objects[name].load_state_dict(state)
            except BaseException as error:
                with suppress(Exception):  # it may refuse what it had as well, for the same reason
                    objects[name].load_state_dict(before[name])
                if not isinstance(error, Exception):
                    raise
                raise ValueError(f"{path}: {name}: {error}") from error
            undo.callback(objects[name].load_state_dict, before[name])
        undo.pop_all()


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"path: expected a path, got {type(path).__name__}") from None


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f'{error}: pip install "fastbn[io]"') from error
    return safetensors


def _states(objects: Mapping[str, Stateful]) -> dict[str, Mapping[str, Any]]:
    """Return the state of each object; refuse names and objects that are none."""
    for name, each in checks.mapping("objects", objects).items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"objects: expected names, text of one letter or more, got {name!r}")
        for start in _starts(name):
            if start in objects:
                raise ValueError(f"objects: expected names that differ, got {start!r} and {name!r}")
        if not all(callable(getattr(each, n, None)) for n in ("state_dict", "load_state_dict")):
            words = f"state_dict and load_state_dict, got {type(each).__name__}"
            raise TypeError(f"objects[{name!r}]: expected {words}")
    states = {name: each.state_dict() for name, each in objects.items()}
    for name, state in states.items():
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"objects[{name!r}]: expected a state_dict with names, got {state!r}")
    return states


def _starts(entry: str) -> Iterable[str]:
    """Return what stands before each dot."""
    return (entry[:at] for at, letter in enumerate(entry) if letter == ".")


def _tensor(entry: str, value: Any) -> NDArray[Any]:
    """Return an array as safetensors takes it: in C order, in this machine's byte order."""
    array = checks.array(entry, value)
    if array.dtype.kind not in "biu" and not checks.is_float(array.dtype):
        words = "booleans, integers, float16, bfloat16, float32 or float64"
        raise TypeError(f"{entry}: expected {words}, got {array.dtype}")
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _plain(entry: str, value: Any) -> Any:
    """Return a value that JSON gives back as it was, but for tuples."""
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(f"{entry}[{key!r}]", each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{entry}[{at}]", each) for at, each in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{entry}: expected an array, number, text, list or dict, got {value!r}")


def _checksum(tensors: Mapping[str, NDArray[Any]], values: dict[str, Any]) -> str:
    crc = zlib.crc32(json.dumps(values).encode())
    for entry, array in sorted(tensors.items()):
        crc = zlib.crc32(f"{entry} {array.dtype.name} {array.shape}".encode(), crc)
        # The file's byte order, whatever that of this machine.
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        crc = zlib.crc32(little.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _read(path: Path) -> dict[str, Any]:
    """Return the entries of a file, tensors as arrays and values as they were saved."""
    safetensors = _safetensors()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, got a folder or a device")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {entry: _tensor(entry, _stored(file, entry)) for entry in file.keys()}  # noqa: SIM118
    # AttributeError, for one, is what types bring about that NumPy does not have.
    except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no safetensors file, or damaged: {error}") from error
    if _METADATA not in metadata:
        return tensors
    try:
        about = json.loads(metadata[_METADATA])
        values = about["values"]
        if about["crc32"] != _checksum(tensors, values):
            raise ValueError("the checksum is another")
        return {**values, **tensors}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _stored(file: Any, entry: str) -> Any:
    """Return a tensor of a file, as an array."""
    if file.get_slice(entry).get_dtype() == "BF16":
        try:
            import ml_dtypes  # noqa: F401  # which tells NumPy about the type
        except ImportError as error:
            raise ImportError(f"{entry} is bfloat16; {error}: pip install ml_dtypes") from error
    return file.get_tensor(entry)


def _some(names: Iterable[str]) -> str:
    """Return names in a row, of a foreign file not all thousand."""
    first = list(islice(names, 11))
    return ", ".join(first[:10]) + (" and more" if len(first) > 10 else "")
