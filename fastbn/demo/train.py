"""Training a small network: configuration, loop, checkpoints, curves."""

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import fastbn
from fastbn import optim
from fastbn.demo import DemoError, require
from fastbn.demo.data import Array, Data, Examples, load
from fastbn.demo.files import one_line, read_npz, refusals, write_atomically
from fastbn.demo.layers import softmax_cross_entropy
from fastbn.demo.network import Part, Sequential, fold, mlp, resnet

Epoch: TypeAlias = dict[str, float]

CHOICES = {
    "model": ("mlp", "resnet"),
    "norm": ("batch", "instance", "none"),
    "optimizer": ("sgd", "momentum", "rmsprop", "adam"),
    "lr_decay": ("none", "inverse", "exponential", "staircase", "cosine"),
}
COMPARED = {"mlp": ("batch", "none"), "resnet": ("batch", "instance", "none")}
EPOCHS = {"mlp": 20, "resnet": 10}
HIDDEN = {"mlp": (256, 128), "resnet": (16, 32)}
LR = {"sgd": 0.3, "momentum": 0.05, "rmsprop": 2e-3, "adam": 3e-3}
DECAY_RATE = {"inverse": 1.0, "exponential": 0.9, "staircase": 0.5}
METRICS = ("loss", "accuracy", "validation_loss", "validation_accuracy")
CHECKPOINT = "fastbn demo checkpoint 2"


class DivergedError(DemoError):
    """The loss is not a finite number any more."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides how a training goes; `configure` knows the defaults.

    Raises
    ------
    DemoError
        If a value is out of its range.
    """

    data: str
    data_dir: str
    model: str
    norm: str
    zero_gamma: bool
    hidden: tuple[int, ...]
    optimizer: str
    lr: float
    lr_decay: str
    decay_rate: float | None
    batch_size: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        # A checkpoint can bring any type: `type(n) is int` keeps True and 3.0 out as well.
        for name, choices in CHOICES.items():
            self._expect(name, getattr(self, name) in choices, " or ".join(choices))
        if self.model == "mlp":
            words = "batch or none with --model mlp, where an example has no positions to average"
            self._expect("norm", self.norm != "instance", words)
        self._expect("zero_gamma", type(self.zero_gamma) is bool, "True or False")
        blocks = self.model == "resnet" and self.norm != "none"
        self._expect("zero_gamma", blocks or not self.zero_gamma, "--model resnet with a norm")
        for name in ("data", "data_dir"):
            self._expect(name, type(getattr(self, name)) is str, "text")
        least = {"batch_size": 2 if self.norm == "batch" else 1, "epochs": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            self._expect(name, type(value) is int and value >= low, f"an integer from {low}")
        widths = self.hidden if type(self.hidden) is tuple else ()
        valid = len(widths) > 0 and all(type(n) is int and n > 0 for n in widths)
        self._expect("hidden", valid, "positive integers like 256,128")
        valid = type(self.lr) is float and 0 < self.lr < math.inf
        self._expect("lr", valid, "a positive number")
        rate = self.decay_rate
        if self.lr_decay in ("none", "cosine"):
            self._expect("decay_rate", rate is None, f"nothing with --lr-decay {self.lr_decay}")
        else:
            highest = math.inf if self.lr_decay == "inverse" else 1
            valid = type(rate) is float and 0 < rate <= highest
            self._expect("decay_rate", valid, f"a number above 0 and at most {highest}")

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise DemoError(f"{option(name)}: expected {expected}, got {getattr(self, name)!r}")


def configure(given: Mapping[str, Any]) -> Config:
    """Build a `Config` from the values given, and defaults that may depend on them."""
    names = {"model": "mlp", "optimizer": "adam", "lr_decay": "exponential", **given}
    defaults = {
        "data": "digits",
        "data_dir": str(Path("fashion-mnist").resolve()),
        "norm": "batch",
        "zero_gamma": False,
        "hidden": HIDDEN.get(names["model"]),
        "lr": LR.get(names["optimizer"]),
        "decay_rate": DECAY_RATE.get(names["lr_decay"]),
        "batch_size": 32,
        "epochs": EPOCHS.get(names["model"]),
        "seed": 0,
    }
    return Config(**{**defaults, **names})


def option(name: str) -> str:
    """Return the command line's word for a field of `Config`."""
    return "--" + name.replace("_", "-")


class Trainer:
    """A network, its data and its optimizer, from one epoch to the next.

    Parameters
    ----------
    config : Config
    data : Data
        What ``load(config.data, config.data_dir)`` returns.

    Raises
    ------
    DemoError
        If the data do not fit the configuration.
    """

    def __init__(self, config: Config, data: Data) -> None:
        examples = len(data.train[0])
        if config.batch_size > examples:
            raise DemoError(
                f"--batch-size: expected at most {examples}, the number of training examples,"
                f" got {config.batch_size}"
            )
        self.config, self.data = config, data
        self.rng = np.random.default_rng(config.seed)
        self.network = build(config, data, self.rng)
        self.optimizer = make_optimizer(config, self.network)
        self.history: list[Epoch] = []
        self.saved: Path | None = None

    @property
    def name(self) -> str:
        """What tells this network from that of another run."""
        return "without norm" if self.config.norm == "none" else f"with {self.config.norm} norm"

    def run(self, save: Path | None = None) -> None:
        """Train up to ``config.epochs``, print a line an epoch, and save each one to a file.

        Raises
        ------
        DivergedError
            If the loss becomes infinite or NaN.
        DemoError
            If the file cannot be written.
        """
        if save:
            self.save(save)  # so that even the first epoch can be interrupted and resumed
        with one_blas_thread():
            while len(self.history) < self.config.epochs:
                line = self.next_epoch()
                if save:
                    self.save(save)
                print(line, flush=True)

    def next_epoch(self) -> str:
        """Train one more epoch, and return the line that tells of it."""
        epochs = self.config.epochs
        title = f"epoch {len(self.history) + 1:{len(str(epochs))}}/{epochs}"
        epoch = self.train_epoch(title)
        self.history.append(epoch)
        values = (f"{name.replace('_', ' ')} {epoch[name]:.4f}" for name in METRICS)
        return "  ".join((title, *values))

    def train_epoch(self, title: str) -> Epoch:
        """Train on each training example once, in minibatches of a new random order."""
        x, y = self.data.train
        size = self.config.batch_size
        self.optimizer.lr = decayed_lr(self.config, epoch=len(self.history))
        self.network.train()
        order = self.rng.permutation(len(x))
        # The few examples left over would make a noisy minibatch, and one alone has no variance.
        minibatches = order[: len(x) // size * size].reshape(-1, size)
        losses, hits = [], 0
        # disable=None shows the bar on a terminal only.
        bar = require("tqdm").tqdm(minibatches, desc=title, leave=False, disable=None)
        with bar, np.errstate(all="ignore"):  # a diverging loss is told below, once
            for rows in bar:
                logits = self.network.forward(x[rows])
                loss, dlogits = softmax_cross_entropy(logits, y[rows])
                self.network.backward(dlogits)
                self.optimizer.step()
                losses.append(loss)
                hits += int((logits.argmax(axis=1) == y[rows]).sum())
        loss, accuracy = float(np.mean(losses)), hits / minibatches.size
        values = loss, accuracy, *self.evaluate(self.data.validation)
        if not np.isfinite(values).all():
            raise DivergedError(
                f"{title}: the loss is not finite any more; --lr {self.config.lr:g} is too high"
            )
        return dict(zip(METRICS, values, strict=True))

    def evaluate(self, examples: Examples) -> tuple[float, float]:
        """Return loss and accuracy in evaluation mode: batch norm uses its running statistics."""
        x, y = examples
        logits = evaluate(self.network, x)
        with np.errstate(all="ignore"):
            loss, _ = softmax_cross_entropy(logits, y)
        return loss, float((logits.argmax(axis=1) == y).mean())

    def epochs_to(self, accuracy: float) -> int | None:
        """Return after how many epochs the validation accuracy first was as high, if ever."""
        reached = [epoch["validation_accuracy"] >= accuracy for epoch in self.history]
        return reached.index(True) + 1 if any(reached) else None

    def state(self) -> dict[str, Any]:
        """Return copies of all that decides how the training goes on: what a checkpoint holds."""
        about = {
            "format": CHECKPOINT,
            "config": dataclasses.asdict(self.config),
            "history": self.history,
            "rng": self.rng.bit_generator.state,
        }
        return {
            "about": np.array(json.dumps(about)),
            **{f"network.{name}": value for name, value in self.network.state_dict().items()},
            **{f"optimizer.{name}": value for name, value in self.optimizer.state_dict().items()},
        }

    def save(self, path: Path, *, option: str = "--save") -> None:
        """Write the state into one file for `load_checkpoint`, whole or not at all."""
        arrays = self.state()
        write_atomically(path, lambda file: np.savez(file, **arrays), option=option)
        self.saved = path

    def export(self, path: Path) -> str:
        """Write the weights and biases of the network with each batch norm folded into them.

        Returns
        -------
        str
            What a network without norm, read back from the file, makes of the test examples.

        Raises
        ------
        DemoError
            If safetensors is missing or the file cannot be written.
        """
        require("safetensors.numpy", extra="io")
        plain = dataclasses.replace(self.config, norm="none", zero_gamma=False)
        first, second = (build(plain, self.data, np.random.default_rng()) for _ in range(2))
        fold(self.network, first)
        with refusals(path, "--export"):
            fastbn.save(path, trained_layers(first))
            fastbn.load(path, trained_layers(second))
        x, _ = self.data.test
        logits, folded = evaluate(self.network, x), evaluate(second, x)
        same = np.count_nonzero(logits.argmax(axis=1) == folded.argmax(axis=1))
        return (
            f"predictions of the folded network: {same} of {len(x)} the same; its logits, up to"
            f" {np.abs(logits).max():.3g}, differ by at most {np.abs(folded - logits).max():.2g}"
        )


def one_blas_thread() -> AbstractContextManager[Any]:
    """Hold BLAS to one thread, for the same bits on any number of cores."""
    # A second one gains next to nothing on products as small as these, waits long for a busy core,
    # and gives other bits.
    limits: AbstractContextManager[Any] = require("threadpoolctl").threadpool_limits(
        1, user_api="blas"
    )
    return limits


def load_checkpoint(
    path: Path, given: Mapping[str, Any], *, data: Data | None = None, option: str = "--resume"
) -> Trainer:
    """Read what `Trainer.save` wrote.

    Parameters
    ----------
    path : Path
    given : mapping
        Fields of `Config` that were asked for. Only ``epochs`` may differ, and only upwards.
    data : Data, optional
        The data, where they are loaded already.
    option : str
        The option that named the file, for error messages.

    Raises
    ------
    DemoError
        If the file is missing, damaged, foreign, or of another configuration.
    """
    arrays = read_npz(path, option=option, compressed=False)
    foreign = DemoError(f"{option} {path}: not a checkpoint of `fastbn train --save`, or damaged")
    try:
        about = json.loads(str(arrays["about"]))
        written = str(about["format"])
        if written != CHECKPOINT and written.startswith(CHECKPOINT[:-1]):
            foreign = DemoError(
                f"--resume {path}: expected a {CHECKPOINT}, got a {written}, of another version"
            )
        if written != CHECKPOINT:
            raise foreign
        saved = about["config"]
        config = Config(**{**saved, "hidden": tuple(saved["hidden"])})
        history = [{name: float(epoch[name]) for name in METRICS} for epoch in about["history"]]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise foreign from error
    config = merge(config, given, path)
    data = data or load(config.data, config.data_dir)
    # Before a network is built: its size comes from the file, and must be in the file.
    weights = sum(n_in * n_out for n_in, n_out in pairwise(layer_sizes(config, data)))
    if weights > sum(array.size for array in arrays.values()):
        raise foreign
    trainer = Trainer(config, data)
    trainer.history, trainer.saved = history, path
    try:
        trainer.network.load_state_dict(_part(arrays, "network."))
        trainer.optimizer.load_state_dict(_part(arrays, "optimizer."))
        trainer.rng.bit_generator.state = about["rng"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DemoError(
            f"{option} {path}: damaged, or {config.data} has changed: {one_line(error)}"
        ) from error
    return trainer


def merge(config: Config, given: Mapping[str, Any], path: Path) -> Config:
    """Raise the epochs of a configuration saved in a file; refuse any other change."""
    for name, value in given.items():
        saved = getattr(config, name)
        if value != saved and name != "epochs":
            raise DemoError(
                f"{option(name)}: cannot change on resuming: expected {saved!r} as in {path},"
                f" got {value!r}"
            )
    epochs = given.get("epochs", config.epochs)
    if epochs < config.epochs:
        raise DemoError(f"--epochs: expected {config.epochs} as in {path} or more, got {epochs}")
    if epochs > config.epochs and config.lr_decay == "cosine":
        raise DemoError(
            f"--epochs: expected {config.epochs} as in {path}, where --lr-decay cosine ends,"
            f" got {epochs}"
        )
    return dataclasses.replace(config, epochs=epochs)


def _part(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def layer_sizes(config: Config, data: Data) -> list[int]:
    """Return what `mlp` or `resnet` takes: the input, the hidden layers, the classes."""
    shape = data.train[0].shape[1:]
    if config.model == "resnet" and len(shape) != 3:
        raise DemoError(f"--model resnet: expected images, got examples of shape {shape}")
    if config.norm == "instance":
        halved = 2 ** (len(config.hidden) - 1)
        if all(size <= halved for size in shape[1:]):
            raise DemoError(
                "--norm instance: expected blocks few enough to leave more than one pixel, got"
                f" {len(config.hidden)} of --hidden, each but the first halving {shape[1:]}"
            )
    n_in = math.prod(shape) if config.model == "mlp" else shape[0]
    return [n_in, *config.hidden, data.classes]


def build(config: Config, data: Data, rng: np.random.Generator) -> Sequential:
    """Build the network."""
    sizes = layer_sizes(config, data)
    if config.model == "mlp":
        return mlp(sizes, norm=config.norm, rng=rng)
    return resnet(sizes, norm=config.norm, zero_gamma=config.zero_gamma, rng=rng)


def evaluate(network: Sequential, x: Array) -> Array:
    """Return the logits, shape (m, K), in evaluation mode."""
    network.eval()
    with np.errstate(all="ignore"):
        # A hundred at a time bounds the memory; in this mode it changes nothing.
        return np.concatenate(
            [network.forward(x[start : start + 100]) for start in range(0, len(x), 100)]
        )


def trained_layers(network: Sequential) -> dict[str, Part]:
    """Return the layers with parameters, by name."""
    return {name: layer for name, layer in network.leaves().items() if layer.params}


def make_optimizer(config: Config, network: Sequential) -> optim.Optimizer:
    """Build the optimizer of the network's parameters."""
    layers = list(trained_layers(network).values())
    match config.optimizer:
        case "sgd":
            return optim.SGD(layers, config.lr)
        case "momentum":
            return optim.SGD(layers, config.lr, momentum=0.9)
        case "rmsprop":
            return optim.RMSprop(layers, config.lr)
        case _:
            return optim.Adam(layers, config.lr)


def decayed_lr(config: Config, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    lr, rate = config.lr, config.decay_rate or 0.0
    match config.lr_decay:
        case "inverse":
            return optim.inverse_time_decay(lr, epoch, rate)
        case "exponential":
            return optim.exponential_decay(lr, epoch, rate)
        case "staircase":
            return optim.staircase_decay(lr, epoch, rate)
        case "cosine":
            return optim.cosine_decay(lr, epoch, config.epochs)
        case _:
            return lr
