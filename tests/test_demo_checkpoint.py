"""Checkpoints of the demo: resumed to the same bits, and refused where they are wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
from demo_cases import QUICK, trainer_for
from support import write_blobs

import fastbn
from fastbn import BatchNorm
from fastbn.demo import DemoError
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.config import OPTIMIZER, configure
from fastbn.demo.files import check_writable, write_atomically
from fastbn.demo.train import State

for module in ("safetensors", "threadpoolctl", "tqdm"):
    pytest.importorskip(module)


@pytest.fixture
def blobs(tmp_path):
    return write_blobs(tmp_path)


def interrupt_after(trainer, minibatches):
    """Let Ctrl-C arrive while the minibatch after so many is trained on."""
    step, count = trainer.optimizer.step, iter(range(minibatches))

    def interrupted():
        if next(count, None) is None:
            raise KeyboardInterrupt
        step()

    trainer.optimizer.step = interrupted


RUNS = [
    {"optimizer": "sgd", "lr_decay": "none"},
    {"optimizer": "momentum", "lr_decay": "inverse", "norm": "none"},
    {"optimizer": "rmsprop", "lr_decay": "staircase"},
    {"optimizer": "adam", "lr_decay": "cosine"},
    {"optimizer": "adam", "model": "resnet"},
    {"norm": "instance", "model": "resnet"},
]


@pytest.mark.parametrize("given", RUNS, ids=lambda given: "-".join(given.values()))
@pytest.mark.parametrize("minibatches", [0, 3, 15, 24])  # of 6 an epoch, 24 in all
def test_an_interrupted_run_resumes_to_the_same_bits(given, minibatches, blobs, tmp_path):
    whole, file = tmp_path / "whole.safetensors", tmp_path / "interrupted.safetensors"
    trainer_for(blobs, **given).run(whole)

    trainer = trainer_for(blobs, **given)
    interrupt_after(trainer, minibatches)
    if minibatches < 24:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(file)
    else:
        trainer.run(file)
    assert trainer.saved == file

    resumed = load_checkpoint(file, {})
    assert len(resumed.history) == minibatches // 6
    resumed.run(file)
    assert file.read_bytes() == whole.read_bytes()


def test_more_epochs_continue_to_the_same_bits(blobs, tmp_path):
    whole, file = tmp_path / "whole.safetensors", tmp_path / "short.safetensors"
    trainer_for(blobs).run(whole)
    trainer_for(blobs, epochs=1).run(file)
    load_checkpoint(file, {"epochs": 4, "seed": 0}).run(file)
    assert file.read_bytes() == whole.read_bytes()


def test_frozen_layers_stay_frozen(blobs, tmp_path):
    file = tmp_path / "frozen.safetensors"
    trainer = trainer_for(blobs, epochs=1)
    first, second = (n for n in trainer.network.leaves().values() if isinstance(n, BatchNorm))
    trainer.run()
    first.freeze()
    second.freeze(affine=True)
    trainer.save(file)
    resumed = load_checkpoint(file, {"epochs": 2})
    resumed.run()
    new = [n for n in resumed.network.leaves().values() if isinstance(n, BatchNorm)]
    assert [repr(norm) for norm in new] == [repr(first), repr(second)]
    for name, values in second.state_dict().items():
        np.testing.assert_array_equal(new[1].state_dict()[name], values)
    np.testing.assert_array_equal(new[0].running_mean, first.running_mean)
    assert (new[0].gamma != first.gamma).any()


@pytest.fixture
def checkpoint(blobs, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    trainer_for(blobs, epochs=2, lr=0.5, norm="none").run(path)
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1}, "--lr: cannot change on resuming: expected 0.5 as in .*, got 0.1"),
        ({"hidden": (8,)}, r"--hidden: .* expected \(8, 8\) .* got \(8,\)"),
        ({"norm": "batch"}, "--norm: .* expected 'none' .* got 'batch'"),
        ({"epochs": 1}, "--epochs: expected 2 as in .* or more, got 1"),
        ({"epochs": "3"}, "--epochs: expected an integer from 1, got '3'"),
    ],
)
def test_another_configuration_cannot_be_resumed(given, message, checkpoint):
    before = checkpoint.read_bytes()
    with pytest.raises(DemoError, match=message):
        load_checkpoint(checkpoint, given)
    assert checkpoint.read_bytes() == before


def test_a_cosine_cannot_be_made_longer(blobs, tmp_path):
    path = tmp_path / "c.safetensors"
    trainer_for(blobs, epochs=1, lr_decay="cosine").run(path)
    with pytest.raises(DemoError, match=r"--epochs: expected 1 .* where --lr-decay cosine ends"):
        load_checkpoint(path, {"epochs": 2})


def parts_of(path):
    """Read a checkpoint, whatever is in it."""
    parts = {name: State() for name in ("run", "network", "optimizer")}
    fastbn.load(path, parts)
    return parts


def forge(path, *, drop=(), run=None, **entries):
    """Change entries of a checkpoint; run: those of its description."""
    parts = parts_of(path)
    for key, value in (run or {}).items():
        whole = {**parts["run"].values[key], **value} if isinstance(value, dict) else value
        parts["run"].values[key] = whole
    for name, value in entries.items():
        part, _, key = name.partition(".")
        parts[part].values[key] = value
    for name in drop:
        part, _, key = name.partition(".")
        del parts[part].values[key]
    fastbn.save(path, parts)


NOT_OURS = "not a checkpoint of `fastbn train --save`, or damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["run.format"]}, NOT_OURS),
        ({"run": {"format": "another"}}, NOT_OURS),
        (
            {"run": {"format": "fastbn demo checkpoint 4"}},
            "expected a fastbn demo checkpoint 3, got a fastbn demo checkpoint 4, of another",
        ),
        ({"run": {"format": 5}}, NOT_OURS),
        ({"run": {"config": {"zero_gamma": 0}}}, NOT_OURS),
        ({"run": {"config": 5}}, NOT_OURS),
        ({"run": {"config": {"more": 5}}}, NOT_OURS),
        ({"run": {"config": {"hidden": 5}}}, NOT_OURS),
        ({"run": {"config": {"hidden": [10**9, 10**9]}}}, NOT_OURS),
        ({"run": {"config": {"hidden": [8.0, 8]}}}, NOT_OURS),
        ({"run": {"config": {"model": ["mlp"]}}}, NOT_OURS),
        ({"run": {"config": {"lr": 10**400}}}, NOT_OURS),
        ({"run": {"history": [{"loss": "low"}]}}, NOT_OURS),
        ({"run": {"config": {"data": "/no/such.npz"}}}, "/no/such.npz: no such file"),
        ({"run": {"config": {"hidden": [8]}}}, "3.bias: expected float32 of shape"),
        ({"run": {"history": [1]}}, NOT_OURS),
        ({"run": {"history": [{"loss": 10**400}]}}, NOT_OURS),
        ({"run": {"rng": {"bit_generator": "MT19937"}}}, "damaged, or .* has changed: "),
        ({"run": {"rng": {"state": {"state": -1, "inc": "x"}}}}, "damaged, or .* has changed: "),
        ({"run": {"rng": None}}, "damaged, or .* has changed: "),
        ({"run": {"frozen": {"9": True}}}, "damaged, or .* has changed: "),
        ({"run": {"frozen": {"1": True}}}, "damaged, or .* has changed: "),  # no norm
        ({"run": {"frozen": ["1"]}}, "damaged, or .* has changed: "),
        ({"drop": ["network.1.weight"]}, "1.weight: expected float32 .* got nothing"),
        ({"network.1.weight": np.zeros((1, 1))}, "1.weight: expected float32 of shape"),
        ({"network.1.weight": "x"}, "1.weight: expected float32 of shape"),
        ({"optimizer.more": np.zeros(1)}, "unknown: more"),
        ({"drop": ["optimizer.lr"]}, "missing: lr"),
        ({"optimizer.lr": "x"}, "lr: expected"),
    ],
)
def test_a_forged_checkpoint(change, message, checkpoint):
    forge(checkpoint, **change)
    before = checkpoint.read_bytes()
    with pytest.raises(DemoError, match=message):
        load_checkpoint(checkpoint, {})
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_before_there_were_betas(blobs, tmp_path):
    path = tmp_path / "old"
    trainer_for(blobs, epochs=1).run(path)
    parts = parts_of(path)
    for name in ("momentum", *OPTIMIZER["adam"]):
        del parts["run"].values["config"][name]
    fastbn.save(path, parts)
    config = load_checkpoint(path, {}).config
    assert config == configure({**QUICK, "data": blobs, "epochs": 1})
    assert (config.momentum, config.beta1, config.beta2, config.eps) == (None, 0.9, 0.999, 1e-8)


def test_a_truncated_checkpoint(checkpoint):
    whole = checkpoint.read_bytes()
    for size in (0, 4, 10, 300, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(DemoError, match=f"{checkpoint}: {NOT_OURS}"):
            load_checkpoint(checkpoint, {})


def test_a_checkpoint_with_a_flipped_bit(checkpoint):
    whole = checkpoint.read_bytes()
    for at in (20, 300, len(whole) - 1):
        checkpoint.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DemoError, match=NOT_OURS):
            load_checkpoint(checkpoint, {})


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    path = tmp_path / "old.npz"
    np.savez(path, about=np.array('{"format": "fastbn demo checkpoint 2"}'))
    with pytest.raises(DemoError, match=r"old.npz: not .* damaged; .npz files are those of an ear"):
        load_checkpoint(path, {})


def test_a_header_of_more_than_there_is(checkpoint):
    header = (
        b'{"run.x":{"dtype":"F64","shape":[1000000000000000],"data_offsets":[0,8000000000000000]}}'
    )
    checkpoint.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DemoError, match=NOT_OURS):
        load_checkpoint(checkpoint, {})
    checkpoint.write_bytes((10**15).to_bytes(8, "little") + header)
    with pytest.raises(DemoError, match=NOT_OURS):
        load_checkpoint(checkpoint, {})


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(DemoError, match="none: no such file"):
        load_checkpoint(tmp_path / "none", {})
    with pytest.raises(DemoError, match=NOT_OURS):
        load_checkpoint(tmp_path, {})


def test_without_safetensors(checkpoint, monkeypatch):
    trainer = load_checkpoint(checkpoint, {})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for work in (lambda: load_checkpoint(checkpoint, {}), lambda: trainer.save(checkpoint)):
        with pytest.raises(DemoError, match=r'safetensors .*: pip install "fastbn\[io\]"'):
            work()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_file(failure, checkpoint, monkeypatch):
    trainer = load_checkpoint(checkpoint, {"epochs": 3})
    before = checkpoint.read_bytes()

    def full(_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises((DemoError, KeyboardInterrupt)) as caught:
            trainer.save(checkpoint)
    if isinstance(caught.value, DemoError):
        assert str(caught.value).endswith("cannot be written: [Errno 28] No space left on device")
    assert checkpoint.read_bytes() == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {"blobs.npz", checkpoint.name}
    assert len(load_checkpoint(checkpoint, {}).history) == 2


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    write_atomically(link, lambda file: file.write(b"new"), option="--save")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("name", [".", "none/file", "blobs.npz/file"])
def test_what_cannot_be_written_is_found_out_before(name, blobs):
    path = Path(blobs).parent / name
    with pytest.raises(DemoError, match=f"--save {path}: "):
        check_writable(path, option="--save")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is no /dev/null")
def test_a_device_is_not_replaced():
    with pytest.raises(DemoError, match="expected a file, got a folder or a device"):
        check_writable(Path("/dev/null"), option="--save")
