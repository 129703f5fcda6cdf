"""The options of the network and its training, which several commands have."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastbn.demo.train import CHOICES, FLOATS, Config, option, read_config


def add_network_options(
    parser: argparse.ArgumentParser, *, optimizer: str = "adam", config: bool = False
) -> None:
    """Add an option for each field of `Config`, and --config if asked for.

    ``optimizer`` is the default of the command, for the help. Values are checked in `Config`, as
    those in a checkpoint must be too.
    """
    add = parser.add_argument_group("network, data and training").add_argument
    if config:
        add(
            "--config",
            type=Path,
            metavar="FILE.json",
            help="values of the options below, as `fastbn tune` writes them; those given win",
        )
    kinds: dict[str, Any] = {"hidden": _widths, "data": _data, "data_dir": _absolute}
    kinds |= {
        **dict.fromkeys(FLOATS, float),
        **dict.fromkeys(("batch_size", "epochs", "seed"), int),
    }
    for field in fields(Config):
        name, text = field.name, field.metadata["help"].format(optimizer=optimizer)
        if name == "zero_gamma":
            add(option(name), action="store_true", help=text)
        else:
            metavar = "|".join(CHOICES.get(name, ())) or field.metadata["metavar"]
            add(option(name), type=kinds.get(name, str), metavar=metavar, help=text)


def read_network_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Config` that were given, in the file of --config or by themselves."""
    values = dict(given)
    path = values.pop("config", None)
    return {**read_config(path), **values} if path else values


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        expected = "expected positive integers like 256,128"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None


def _absolute(text: str) -> str:
    # So that a run can be resumed from another folder.
    return str(Path(text).resolve())


def _data(text: str) -> str:
    return _absolute(text) if text.endswith(".npz") else text
