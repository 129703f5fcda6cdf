"""The options of the network and its training, which several commands have."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastbn.demo.config import CHOICES, FLOATS, Config, option, read_config
from fastbn.demo.files import absolute


def add_network_options(
    parser: argparse.ArgumentParser,
    told: Mapping[str, str] | None = None,
    *,
    optimizer: str = "adam",
) -> None:
    """Add an option for each field of `Config`; values are checked there.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    told : mapping of str to str, optional
        What the help says, of which fields. By default it tells of all, in the words of `Config`.
    optimizer : str
        The default of the command, for the help.
    """
    add = parser.add_argument_group("network, data and training").add_argument
    kinds: dict[str, Any] = {"hidden": _widths, "data": _data, "data_dir": absolute}
    kinds |= dict.fromkeys(FLOATS, float) | dict.fromkeys(("batch_size", "epochs", "seed"), int)
    for field in fields(Config):
        if not field.metadata["help"]:
            continue
        name, text = field.name, field.metadata["help"].format(optimizer=optimizer)
        if told is not None:
            text = told.get(name, argparse.SUPPRESS)
        if name == "zero_gamma":
            add(option(name), action="store_true", help=text)
        else:
            metavar = "|".join(CHOICES.get(name, ())) or field.metadata["metavar"]
            add(option(name), type=kinds.get(name, str), metavar=metavar, help=text)


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add --config."""
    text = "values of the options of the network, as `fastbn tune` writes them; those given win"
    parser.add_argument("--config", type=Path, metavar="FILE.json", help=text)


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


def _data(text: str) -> str:
    # So that a run can be resumed from another folder.
    return absolute(text) if text.endswith(".npz") else text
