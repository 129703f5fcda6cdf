"""Training a small network: loop, export."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import fastbn
from fastbn import distributed
from fastbn.demo import DemoError, require
from fastbn.demo.config import Config
from fastbn.demo.data import Array, Data, Examples
from fastbn.demo.files import refusals
from fastbn.demo.layers import Layer, softmax_cross_entropy
from fastbn.demo.network import Part, Sequential, fold, mlp, resnet

Epoch: TypeAlias = dict[str, float]
METRICS = ("loss", "accuracy", "validation_loss", "validation_accuracy")
CHECKPOINT = "fastbn demo checkpoint 3"


class DivergedError(DemoError):
    """The loss is not a finite number any more."""


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
