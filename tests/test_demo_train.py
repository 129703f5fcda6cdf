"""The loop, its configuration, the export and the curves, on examples that are quickly learnt."""

import re
import sys

import numpy as np
import pytest
from demo_cases import trainer_for
from support import write_blobs

from fastbn.demo import DemoError
from fastbn.demo.config import CHOICES, COMPARED, configure, read_config
from fastbn.demo.curves import draw
from fastbn.demo.layers import Conv2d, Linear
from fastbn.demo.train import DivergedError, decayed_lr

pytest.importorskip("tqdm")
pytest.importorskip("threadpoolctl")


@pytest.fixture
def blobs(tmp_path):
    return write_blobs(tmp_path)


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
        ({"model": ["mlp"]}, "--model: expected mlp or resnet, got ['mlp']"),
        ({"norm": {"a": 1}}, "--norm: expected batch or instance or none, got {'a': 1}"),
        ({"optimizer": None}, "--optimizer: expected sgd or momentum or rmsprop or adam, got None"),
        ({"lr_decay": []}, "--lr-decay: expected none or inverse or .*, got []"),
        ({"lr": 10**400}, "--lr: expected a positive number, got 1000"),
        (
            {"lr_decay": "inverse", "decay_rate": float("inf")},
            "--decay-rate: expected a positive number, got inf",
        ),
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
    with pytest.raises(DemoError, match=re.sub(r"([()\[\]{}])", r"\\\1", message)):
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON: "),
        ("[" * 10**5, "cannot be read as JSON: "),
        ("[]", "expected an object with some of data, data_dir, model"),
        ('{"lr": 0.1, "more": 1}', "expected an object with some of data, data_dir, model"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(DemoError, match=f"--config {path}: {message}"):
        read_config(path)


def test_a_configuration_from_a_file_is_checked(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"lr": 1, "hidden": [8], "batch_size": 2.5}')
    assert read_config(path) == {"lr": 1.0, "hidden": (8,), "batch_size": 2.5}
    with pytest.raises(DemoError, match=r"--batch-size: expected an integer from 2, got 2.5"):
        configure(read_config(path))
    path.write_text('{"lr": 1' + "0" * 400 + "}")
    with pytest.raises(DemoError, match=r"--lr: expected a positive number, got 1000"):
        configure(read_config(path))


def test_momentum_and_betas_arrive(blobs):
    momentum = trainer_for(blobs, optimizer="momentum", momentum=0.7).optimizer
    assert momentum.momentum == 0.7
    adam = trainer_for(blobs, beta1=0.8, beta2=0.0, eps=1e-4).optimizer
    assert (adam.betas, adam.eps) == ((0.8, 0.0), 1e-4)


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
