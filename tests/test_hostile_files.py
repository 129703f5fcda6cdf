"""Files that were cut off at any byte, and safetensors headers that lie: nothing is half loaded."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from demo_runs import config_for
from support import write_blobs

import fastbn
from fastbn.demo import DemoError, watch
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.log import Log, Nudge

stored = pytest.importorskip("safetensors.numpy")


def trained():
    """Return a layer and its optimizer, some steps on."""
    bn = fastbn.BatchNorm(2)
    adam = fastbn.optim.Adam(bn, lr=0.25)
    for x in np.random.default_rng(0).standard_normal((3, 8, 2), np.float32):
        bn(x), bn.backward(x), adam.step()
    return {"bn": bn, "adam": adam}


def fresh():
    bn = fastbn.BatchNorm(2)
    return {"bn": bn, "adam": fastbn.optim.Adam(bn)}


def told(objects):
    """Return all that the states hold, as text with each bit."""
    states = {name: each.state_dict() for name, each in objects.items()}
    return repr(
        {
            (name, key): value.tobytes() if isinstance(value, np.ndarray) else value
            for name, state in states.items()
            for key, value in state.items()
        }
    )


def check_refused(path, objects):
    """Expect an error that names the file, and objects as they were."""
    before = told(objects)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        fastbn.load(path, objects)
    assert told(objects) == before


def test_a_file_cut_off_at_any_byte_or_with_a_changed_one(tmp_path):
    path, objects = tmp_path / "run.safetensors", {"bn": fastbn.BatchNorm(2)}
    fastbn.save(path, {"bn": trained()["bn"]})
    whole, before, after = path.read_bytes(), told(objects), told({"bn": trained()["bn"]})
    changed = [bytearray(whole) for _ in range(0, len(whole), 5)]
    for n, content in enumerate(changed):
        content[5 * n] ^= 0x15
    for content in (*(whole[:n] for n in range(len(whole))), *changed):
        path.write_bytes(content)
        try:
            fastbn.load(path, objects)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # without fastbn's metadata it is a file of the same values by somebody else
            assert b'"fastbn"' not in content
            assert told(objects) == after
            objects = {"bn": fastbn.BatchNorm(2)}
        assert told(objects) == before


def file_of(header, body=bytes(64)):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlapping tensors": {"bn.weight": tensor(0, 8, [2]), "bn.bias": tensor(4, 12, [2])},
    "a gap": {"bn.weight": tensor(0, 8, [2]), "bn.bias": tensor(16, 64, [12])},
    "an end before the begin": {"bn.weight": tensor(8, 0, [2])},
    "more than there is": {"bn.weight": tensor(0, 2**40, [2**38])},
    "another size than the shape's": {"bn.weight": tensor(0, 64, [2])},
    "a count past 64 bits": {"bn.weight": tensor(0, 64, [2**62, 2**62])},
    "an offset past 64 bits": {"bn.weight": tensor(0, 2**70, [16])},
    "a negative offset": {"bn.weight": tensor(-8, 56, [16])},
    "a negative size": {"bn.weight": tensor(0, 64, [-4, -4])},
    "no type": {"bn.weight": tensor(0, 64, [16], "F33")},
    "a type without a NumPy one": {"bn.weight": tensor(0, 64, [32], "BF16")},
    "no shape": {"bn.weight": {"dtype": "F32", "data_offsets": [0, 64]}},
    "ten thousand entries": {f"bn.{n}": tensor(0, 0, [0]) for n in range(10_000)},
    "text in the place of numbers": {"bn.weight": tensor("0", "64", ["16"])},
    "no entries": {},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(name, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(file_of(HEADERS[name]))
    check_refused(path, fresh())


@pytest.mark.parametrize("length", [0, 1, 2, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_it_says(length, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"bn.weight": 1}')
    check_refused(path, fresh())


STATES = {
    "another shape": ("running_var", np.ones((2, 2))),
    "a variance below 0": ("running_var", np.array([1.0, -1.0])),
    "a count that is none": ("num_batches_tracked", np.array(-1)),
    "a fraction as count": ("num_batches_tracked", np.array(0.5)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_no_layer_has(name, tmp_path):
    path, (key, value) = tmp_path / "state.safetensors", STATES[name]
    state = {f"bn.{each}": np.asarray(v) for each, v in trained()["bn"].state_dict().items()}
    stored.save_file(state, path)
    fastbn.load(path, {"bn": fastbn.BatchNorm(2)})  # this one fits
    stored.save_file({**state, f"bn.{key}": np.ascontiguousarray(value)}, path)
    check_refused(path, {"bn": fastbn.BatchNorm(2)})


def test_nan_is_loaded_where_a_run_may_have_left_it_and_refused_elsewhere(tmp_path):
    path, objects = tmp_path / "run.safetensors", trained()
    objects["bn"].running_mean[0] = objects["bn"].gamma[1] = np.nan
    fastbn.save(path, objects)
    others = fresh()
    fastbn.load(path, others)
    assert told(others) == told(objects)
    state = {**objects["adam"].state_dict(), "lr": np.nan}
    forged = SimpleNamespace(state_dict=lambda: state, load_state_dict=state.update)
    fastbn.save(path, {"bn": objects["bn"], "adam": forged})
    check_refused(path, others)


# ------------------------------------------------------------------------------- folders of runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with a nudge, and its files."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    write_blobs(folder.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "draw", lambda *_, **__: None)
        watch.start(folder, config_for(folder, epochs=2))
    return folder


def test_a_log_cut_off_at_any_byte(run):
    path = run / "log.jsonl"
    whole, events = path.read_bytes(), Log.read(run).events
    shorter = 0
    try:
        for n in [*range(0, len(whole), 3), *range(len(whole) - 40, len(whole))]:
            path.write_bytes(whole[:n])
            try:
                found = Log.read(run).events
            except DemoError as error:
                assert str(run) in str(error)  # noqa: PT017
            else:  # at the end of a line: what happened up to there
                assert whole[n - 1 : n] == b"\n" or whole[n : n + 1] == b"\n"
                assert found == events[: len(found)]
                shorter += 1
    finally:
        path.write_bytes(whole)
    assert shorter < 2 * len(events) + 2


def test_a_nudge_cut_off_at_any_byte():
    whole = json.dumps(Nudge(lr=0.125, rollback=1, stop=True).changes()).encode()
    for n in range(len(whole)):
        with pytest.raises(DemoError):
            Nudge.read(whole[:n])


def test_a_checkpoint_of_a_run_cut_off_at_any_byte(run):
    path = watch.checkpoint(run, 1)
    whole = path.read_bytes()
    places = [*range(64), *range(64, len(whole), 97), len(whole) - 1]
    try:
        for n in places:
            path.write_bytes(whole[:n])
            with pytest.raises(DemoError, match=re.escape(str(path))):
                load_checkpoint(path, {})
    finally:
        path.write_bytes(whole)
    load_checkpoint(path, {})
