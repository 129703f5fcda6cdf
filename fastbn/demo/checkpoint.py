"""Checkpoints read again, whatever may have happened to the file."""

import dataclasses
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn.demo import DemoError, require
from fastbn.demo.config import Config, configure, option
from fastbn.demo.data import Data, load
from fastbn.demo.files import one_line
from fastbn.demo.train import CHECKPOINT, METRICS, State, Trainer, layer_sizes


def load_checkpoint(path: Path, given: Mapping[str, Any], data: Data | None = None) -> Trainer:
    """Read what `Trainer.save` wrote.

    Parameters
    ----------
    path : Path
    given : mapping
        Fields of `Config` that were asked for. Only ``epochs`` may differ, and only upwards.
    data : Data, optional
        The data, where they are loaded already.

    Raises
    ------
    DemoError
        If the file is missing, damaged, foreign, or of another configuration.
    """
    require("safetensors", extra="io")
    states = {name: State() for name in ("run", "network", "optimizer")}
    run, network, optimizer = states.values()
    foreign = f"{path}: not a checkpoint of `fastbn train --save`, or damaged"
    try:
        fastbn.load(path, states)
        written = str(run.values["format"])
        saved = run.values["config"]
        # Fields that were added since have the defaults that there were.
        config = configure({**saved, "hidden": tuple(saved["hidden"])})
        history = [{name: float(e[name]) for name in METRICS} for e in run.values["history"]]
    except FileNotFoundError:
        raise DemoError(f"{path}: no such file") from None
    except OSError as error:
        raise DemoError(f"{path}: cannot be read: {one_line(error)}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if path.is_file() and zipfile.is_zipfile(path):
            foreign += "; .npz files are those of an earlier version"
        raise DemoError(foreign) from error
    if written != CHECKPOINT and written.startswith(CHECKPOINT[:-1]):
        foreign = f"{path}: expected a {CHECKPOINT}, got a {written}, of another version"
    if written != CHECKPOINT:
        raise DemoError(foreign)
    config = merge(config, given, path)
    data = data or load(config.data, config.data_dir)
    # Before a network is built: its size comes from the file, and must be in the file.
    weights = sum(n_in * n_out for n_in, n_out in pairwise(layer_sizes(config, data)))
    if weights > sum(map(np.size, (*network.values.values(), *optimizer.values.values()))):
        raise DemoError(foreign)
    trainer = Trainer(config, data)
    trainer.history, trainer.saved = history, path
    try:
        trainer.network.load_state_dict(network.values)
        trainer.optimizer.load_state_dict(optimizer.values)
        trainer.rng.bit_generator.state = run.values["rng"]
        leaves: dict[str, Any] = trainer.network.leaves()
        for name, affine in run.values.get("frozen", {}).items():
            leaves[name].freeze(affine=affine)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise DemoError(
            f"{path}: damaged, or {config.data} has changed: {one_line(error)}"
        ) from error
    return trainer


def merge(config: Config, given: Mapping[str, Any], path: Path) -> Config:
    """Raise the epochs of a configuration saved in a file; refuse any other change."""
    # The one that may change goes through the checks of `Config`; the others are compared.
    merged = dataclasses.replace(config, epochs=given.get("epochs", config.epochs))
    for name, value in given.items():
        saved = getattr(config, name)
        if value != saved and name != "epochs":
            raise DemoError(
                f"{option(name)}: cannot change on resuming: expected {saved!r} as in {path},"
                f" got {value!r}"
            )
    if merged.epochs < config.epochs:
        raise DemoError(
            f"--epochs: expected {config.epochs} as in {path} or more, got {merged.epochs}"
        )
    if merged.epochs > config.epochs and config.lr_decay == "cosine":
        raise DemoError(
            f"--epochs: expected {config.epochs} as in {path}, where --lr-decay cosine ends,"
            f" got {merged.epochs}"
        )
    return merged
