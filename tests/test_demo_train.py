"""The loop, its configuration, checkpoints and curves, on examples that are quickly learnt."""

import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import write_blobs

from fastbn.demo import DemoError
from fastbn.demo.curves import draw
from fastbn.demo.data import load
from fastbn.demo.files import check_writable, write_atomically
from fastbn.demo.layers import Conv2d, Linear
from fastbn.demo.train import (
    CHOICES,
    COMPARED,
    DivergedError,
    Trainer,
    configure,
    decayed_lr,
    load_checkpoint,
)

pytest.importorskip("tqdm")
pytest.importorskip("threadpoolctl")

QUICK = {"hidden": (8, 8), "epochs": 4, "batch_size": 16}


@pytest.fixture
def blobs(tmp_path):
    return write_blobs(tmp_path)


def trainer_for(blobs, **given):
    config = configure({**QUICK, "data": blobs, **given})
    return Trainer(config, load(config.data))


def interrupt_after(trainer, minibatches):
    """Let Ctrl-C arrive while the minibatch after so many is trained on."""
    step, count = trainer.optimizer.step, iter(range(minibatches))

    def interrupted():
        if next(count, None) is None:
            raise KeyboardInterrupt
        step()

    trainer.optimizer.step = interrupted


@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
@pytest.mark.parametrize(
    ("model", "norm"), [(model, norm) for model, norms in COMPARED.items() for norm in norms]
)
def test_every_combination_learns(model, norm, optimizer, blobs):
    trainer = trainer_for(blobs, model=model, norm=norm, optimizer=optimizer, epochs=12)
    trainer.run()
    assert trainer.history[-1]["loss"] < 0.7 * trainer.history[0]["loss"]
    assert trainer.evaluate(trainer.data.test)[1] >= 0.75


def test_the_same_seed_gives_the_same_bits_and_another_others(blobs):
    one, same, other = (trainer_for(blobs, seed=seed) for seed in (5, 5, 6))
    for trainer in (one, same, other):
        trainer.run()
    assert one.history == same.history != other.history
    for name, value in one.network.state_dict().items():
        np.testing.assert_array_equal(value, same.network.state_dict()[name])


def test_a_line_an_epoch_and_nothing_else(blobs, capsys):
    trainer_for(blobs, epochs=10).run()
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    lines = out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("epoch  1/10  loss ")
    assert "  accuracy " in lines[9]
    assert "  validation accuracy " in lines[9]


def test_a_terminal_gets_a_progress_bar(blobs, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer_for(blobs, epochs=1).run()
    assert "epoch 1/1: " in capsys.readouterr().err


def test_an_incomplete_last_minibatch_is_left_out(blobs):
    trainer = trainer_for(blobs, batch_size=25)
    assert len(trainer.data.train[0]) % 25 == 1  # one example alone has no variance
    trainer.run()
    batches = trainer.network.state_dict()["2.num_batches_tracked"]
    assert batches == 4 * (len(trainer.data.train[0]) // 25)


def test_evaluation_changes_nothing(blobs):
    trainer = trainer_for(blobs)
    trainer.run()
    before = trainer.network.state_dict()
    first = trainer.evaluate(trainer.data.train)
    assert trainer.evaluate(trainer.data.train) == first
    for name, value in trainer.network.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_diverging_loss_is_an_error_without_warnings(blobs):
    trainer = trainer_for(blobs, norm="none", optimizer="sgd", lr=1e30)
    with pytest.raises(DivergedError, match=r"epoch \d/4: .* --lr 1e\+30 is too high"):
        trainer.run()


def test_epochs_to_an_accuracy(blobs):
    trainer = trainer_for(blobs)
    trainer.history = [{"validation_accuracy": value} for value in (0.5, 0.95, 0.9)]
    assert trainer.epochs_to(0.95) == 2
    assert trainer.epochs_to(0.5) == 1
    assert trainer.epochs_to(0.96) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lr_decay": "none"}, [1, 1, 1]),
        ({"lr_decay": "inverse"}, [1, 1 / 2, 1 / 11]),
        ({"lr_decay": "inverse", "decay_rate": 0.1}, [1, 1 / 1.1, 1 / 2]),
        ({}, [1, 0.9, 0.9**10]),
        ({"decay_rate": 0.5}, [1, 0.5, 0.5**10]),
        ({"lr_decay": "staircase"}, [1, 1, 0.5]),
        ({"lr_decay": "staircase", "decay_rate": 0.1}, [1, 1, 0.1]),
        ({"lr_decay": "cosine"}, [1, (1 + np.cos(np.pi / 20)) / 2, 0.5]),
    ],
)
def test_the_learning_rate_decays_from_epoch_0(given, expected):
    config = configure({"lr": 1.0, **given})
    rates = [decayed_lr(config, epoch) for epoch in (0, 1, 10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_the_optimizer_gets_the_decayed_rate(blobs):
    trainer = trainer_for(blobs, lr=0.01, decay_rate=0.5, epochs=3)
    trainer.run()
    assert trainer.optimizer.lr == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "cnn"}, "--model: expected mlp or resnet, got 'cnn'"),
        ({"norm": "layer"}, "--norm: expected batch or instance or none, got 'layer'"),
        ({"norm": "instance"}, "--norm: expected batch or none with --model mlp, where an example"),
        ({"zero_gamma": True}, "--zero-gamma: expected --model resnet with a norm, got True"),
        ({"zero_gamma": True, "model": "resnet", "norm": "none"}, "--zero-gamma: expected --model"),
        ({"zero_gamma": 1, "model": "resnet"}, "--zero-gamma: expected True or False, got 1"),
        ({"optimizer": "lbfgs"}, "--optimizer: expected sgd or .*, got 'lbfgs'"),
        ({"lr_decay": "step"}, "--lr-decay: expected none or .*, got 'step'"),
        ({"lr": 0.0}, "--lr: expected a positive number, got 0.0"),
        ({"lr": float("nan")}, "--lr: expected a positive number, got nan"),
        ({"lr": float("inf")}, "--lr: expected a positive number, got inf"),
        ({"epochs": 0}, "--epochs: expected an integer from 1, got 0"),
        ({"epochs": True}, "--epochs: expected an integer from 1, got True"),
        ({"seed": -1}, "--seed: expected an integer from 0, got -1"),
        ({"batch_size": 1}, "--batch-size: expected an integer from 2, got 1"),
        ({"batch_size": 0, "norm": "none"}, "--batch-size: expected an integer from 1, got 0"),
        ({"hidden": ()}, "--hidden: expected positive integers like 256,128, got ()"),
        ({"hidden": (8, 0)}, "--hidden: expected positive integers"),
        ({"hidden": 8}, "--hidden: expected positive integers"),
        ({"data": 1}, "--data: expected text, got 1"),
        ({"decay_rate": 1.5}, "--decay-rate: expected a number above 0 and at most 1, got 1.5"),
        ({"decay_rate": 0.0}, "--decay-rate: expected a number above 0"),
        ({"lr_decay": "cosine", "decay_rate": 0.5}, "expected nothing with --lr-decay cosine"),
    ],
)
def test_values_out_of_range(given, message):
    with pytest.raises(DemoError, match=message.replace("()", r"\(\)")):
        configure(given)


def test_data_that_do_not_fit(blobs, tmp_path):
    with pytest.raises(DemoError, match=r"--batch-size: expected at most 101, .* got 102"):
        trainer_for(blobs, batch_size=102)
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=np.eye(40), y=np.arange(40) % 2)
    with pytest.raises(DemoError, match=r"--model resnet: expected images, got .* shape \(40,\)"):
        trainer_for(str(rows), model="resnet")


def test_instance_norm_needs_more_than_one_pixel(blobs):
    given = {"model": "resnet", "norm": "instance", "hidden": (4, 4, 4)}
    with pytest.raises(DemoError, match=r"--norm instance: .* 3 of --hidden, .* halving \(4, 4\)"):
        trainer_for(blobs, **given)
    trainer_for(blobs, **{**given, "norm": "batch"})


def test_gamma_starts_at_zero_where_asked(blobs):
    trainer = trainer_for(blobs, model="resnet", zero_gamma=True)
    gammas = {n: p.gamma.any() for n, p in trainer.network.leaves().items() if "gamma" in p.params}
    assert {name for name, some in gammas.items() if not some} == {"2.end", "3.end"}
    trainer.run()
    assert trainer.network.children["2"].children["end"].gamma.any()


def test_names_tell_norms_apart(blobs):
    names = [trainer_for(blobs, model="resnet", norm=norm).name for norm in COMPARED["resnet"]]
    assert names == ["with batch norm", "with instance norm", "without norm"]


@pytest.mark.parametrize(
    ("model", "norm"), [("mlp", "batch"), ("resnet", "batch"), ("mlp", "none")]
)
def test_an_exported_network_predicts_the_same(model, norm, blobs, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "weights.safetensors"
    trainer = trainer_for(blobs, model=model, norm=norm)
    trainer.run()
    before = trainer.network.state_dict()
    line = trainer.export(path)
    count, total, largest, difference = re.fullmatch(
        r"predictions of the folded network: (\d+) of (\d+) the same; its logits, up to (\S+),"
        r" differ by at most (\S+)",
        line,
    ).groups()
    assert count == total == "28"
    assert float(difference) < 1e-5 * float(largest)
    for name, value in trainer.network.state_dict().items():
        np.testing.assert_array_equal(value, before[name])

    # Linear and convolutional layers alone, each with a bias.
    entries = numpy.load_file(path)
    assert {name.rpartition(".")[2] for name in entries} == {"weight", "bias"}
    maps = [leaf for leaf in trainer.network.leaves().values() if type(leaf) in (Linear, Conv2d)]
    assert len(entries) == 2 * len(maps)
    if model == "mlp":
        x, _ = trainer.data.test
        y = x.reshape(len(x), -1)
        for at in (1, 3):
            y = np.maximum(y @ entries[f"{at}.weight"].T + entries[f"{at}.bias"], 0)
        y = y @ entries["5.weight"].T + entries["5.bias"]
        np.testing.assert_allclose(y, trainer.network.forward(x), atol=1e-4)


def test_an_export_that_fails_leaves_the_old_file(blobs, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    trainer = trainer_for(blobs)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DemoError, match=r"--export .*: cannot be written: \[Errno 28\] No space"):
        trainer.export(path)
    assert path.read_bytes() == b"old"


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
    whole, file = tmp_path / "whole.npz", tmp_path / "interrupted.npz"
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
    whole, file = tmp_path / "whole.npz", tmp_path / "short.npz"
    trainer_for(blobs).run(whole)
    trainer_for(blobs, epochs=1).run(file)
    load_checkpoint(file, {"epochs": 4, "seed": 0}).run(file)
    assert file.read_bytes() == whole.read_bytes()


@pytest.fixture
def checkpoint(blobs, tmp_path):
    path = tmp_path / "checkpoint.npz"
    trainer_for(blobs, epochs=2, lr=0.5, norm="none").run(path)
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1}, "--lr: cannot change on resuming: expected 0.5 as in .*, got 0.1"),
        ({"hidden": (8,)}, r"--hidden: .* expected \(8, 8\) .* got \(8,\)"),
        ({"norm": "batch"}, "--norm: .* expected 'none' .* got 'batch'"),
        ({"epochs": 1}, "--epochs: expected 2 as in .* or more, got 1"),
    ],
)
def test_another_configuration_cannot_be_resumed(given, message, checkpoint):
    before = checkpoint.read_bytes()
    with pytest.raises(DemoError, match=message):
        load_checkpoint(checkpoint, given)
    assert checkpoint.read_bytes() == before


def test_a_cosine_cannot_be_made_longer(blobs, tmp_path):
    path = tmp_path / "c.npz"
    trainer_for(blobs, epochs=1, lr_decay="cosine").run(path)
    with pytest.raises(DemoError, match=r"--epochs: expected 1 .* where --lr-decay cosine ends"):
        load_checkpoint(path, {"epochs": 2})


def forge(path, *, drop=(), about=None, **arrays):
    """Change entries of a checkpoint; about: fields of its description."""
    with np.load(path) as file:
        content = dict(file)
    text = json.loads(str(content["about"]))
    for key, value in (about or {}).items():
        if isinstance(value, dict):
            text[key].update(value)
        else:
            text[key] = value
    content |= {"about": np.array(json.dumps(text)), **arrays}
    np.savez(path, **{key: value for key, value in content.items() if key not in drop})


NOT_OURS = "not a checkpoint of `fastbn train --save`, or damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["about"]}, NOT_OURS),
        ({"about": {"format": "another"}}, NOT_OURS),
        (
            {"about": {"format": "fastbn demo checkpoint 1"}},
            "expected a fastbn demo checkpoint 2, got a fastbn demo checkpoint 1, of another",
        ),
        ({"about": {"config": {"zero_gamma": 0}}}, NOT_OURS),
        ({"about": {"config": 5}}, NOT_OURS),
        ({"about": {"config": {"more": 5}}}, NOT_OURS),
        ({"about": {"config": {"hidden": 5}}}, NOT_OURS),
        ({"about": {"config": {"hidden": [10**9, 10**9]}}}, NOT_OURS),
        ({"about": {"config": {"hidden": [8.0, 8]}}}, NOT_OURS),
        ({"about": {"config": {"model": ["mlp"]}}}, NOT_OURS),
        ({"about": {"config": {"lr": 10**400}}}, NOT_OURS),
        ({"about": {"config": {"data": "/no/such.npz"}}}, "/no/such.npz: no such file"),
        ({"about": {"config": {"hidden": [8]}}}, "3.bias: expected float32 of shape"),
        ({"about": {"history": [1]}}, NOT_OURS),
        ({"about": {"history": [{"loss": 10**400}]}}, NOT_OURS),
        ({"about": {"rng": {"bit_generator": "MT19937"}}}, "damaged, or .* has changed: "),
        ({"about": {"rng": {"state": {"state": -1, "inc": "x"}}}}, "damaged, or .* has changed: "),
        ({"about": {"rng": None}}, "damaged, or .* has changed: "),
        ({"drop": ["network.1.weight"]}, "1.weight: expected float32 .* got nothing"),
        ({"network.1.weight": np.zeros((1, 1))}, "1.weight: expected float32 of shape"),
        ({"network.1.weight": np.array(["x"])}, "1.weight: expected float32 of shape"),
        ({"optimizer.more": np.zeros(1)}, "unknown: more"),
        ({"drop": ["optimizer.lr"]}, "missing: lr"),
        ({"optimizer.lr": np.array("x")}, "lr: expected"),
        ({"extra": np.array([print], dtype=object)}, "cannot be read: Object arrays"),
    ],
)
def test_a_forged_checkpoint(change, message, checkpoint):
    forge(checkpoint, **change)
    before = checkpoint.read_bytes()
    with pytest.raises(DemoError, match=message):
        load_checkpoint(checkpoint, {})
    assert checkpoint.read_bytes() == before


def test_a_truncated_checkpoint(checkpoint):
    whole = checkpoint.read_bytes()
    for size in (0, 10, 300, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(DemoError, match=r"not an .npz file, or damaged"):
            load_checkpoint(checkpoint, {})


def test_a_checkpoint_that_unpacks_to_more_than_it_is(checkpoint):
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("about.npy", bytes(10**6))
    with pytest.raises(DemoError, match="cannot be read: its contents are compressed"):
        load_checkpoint(checkpoint, {})


def test_an_array_larger_than_the_memory(checkpoint):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(checkpoint, "w") as file:
        file.writestr("about.npy", content)
    with pytest.raises(DemoError, match="cannot be read: "):
        load_checkpoint(checkpoint, {})


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(DemoError, match=r"--resume .*: no such file"):
        load_checkpoint(tmp_path / "none.npz", {})


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_file(failure, checkpoint, monkeypatch):
    trainer = load_checkpoint(checkpoint, {"epochs": 3})
    before = checkpoint.read_bytes()

    def full(file, **_):
        file.write(before[:100])
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises((DemoError, KeyboardInterrupt)) as caught:
            trainer.save(checkpoint)
    if isinstance(caught.value, DemoError):
        assert str(caught.value).endswith("cannot be written: [Errno 28] No space left on device")
    assert checkpoint.read_bytes() == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {"blobs.npz", "checkpoint.npz"}
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


@pytest.mark.parametrize("norms", [("batch",), ("batch", "instance", "none")])
def test_curves(norms, blobs, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    trainers = [trainer_for(blobs, norm=norm, model="resnet") for norm in norms]
    for trainer in trainers:
        trainer.run()
    trainers[-1].history = trainers[-1].history[:-1]  # as of a network that diverged
    draw(tmp_path / "curves.png", trainers)
    pixels = image.imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (576, 1320)
    assert pixels.std() > 0.05
    edges = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
    assert all((edge == 1).all() for edge in edges)  # nothing is cut off


def test_curves_with_marks_and_epochs_undone(blobs, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    trainer = trainer_for(blobs)
    trainer.run()
    pictures = []
    for more in (
        {},
        {"marks": [(3, "lr 0.1\nmomentum 0.8", False)]},
        {"marks": [(3, "lr 0.1\nmomentum 0.8", True)]},
        {"undone": [(2, trainer.history[::-1])]},
        {"lr": 0.5},
    ):
        draw(tmp_path / "curves.png", [trainer], **more)
        pictures.append(image.imread(tmp_path / "curves.png"))
    for pixels in pictures:
        edges = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
        assert all((edge == 1).all() for edge in edges)  # nothing is cut off
    assert len({pixels.tobytes() for pixels in pictures}) == len(pictures)


def test_curves_without_any_epoch(blobs, tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "curves.png", [trainer_for(blobs)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
