"""Train a small NumPy network with batch norm, on images of digits or on other data.

The examples are split into training, validation and test examples, always in the same way. The line
of an epoch gives loss and accuracy on the training examples, minibatch by minibatch while learning
from them, and on the validation examples afterwards. The last line gives the accuracy on the test
examples. The same options give the same bits. `fastbn watch` trains in a folder and keeps more.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbn.cli.network import add_config_option, add_network_options, read_network_options
from fastbn.cli.results import add_file_options, check_files, resumable, tell
from fastbn.demo import DemoError
from fastbn.demo.data import load
from fastbn.demo.train import COMPARED, DivergedError, Trainer, configure


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_config_option(parser)
    add_network_options(parser)
    add_file_options(parser).add_argument(
        "--compare",
        action="store_true",
        help="train the same network with batch norm, for the resnet with instance norm, and"
        " without, draw all (default: into compare.png), and tell how many epochs each takes to"
        " 95%% validation accuracy",
    )


def run(
    *,
    plot: Path | None = None,
    compare: bool = False,
    save: Path | None = None,
    export: Path | None = None,
    **given: Any,
) -> int:
    """Train one network, or several to compare."""
    config_file = given.get("config")
    fields = read_network_options(given)
    if compare:
        if save or export or "norm" in fields:
            raise DemoError("--compare: cannot be used with --norm, --save or --export")
        plot = plot or Path("compare.png")
    config = configure(fields)
    check_files(config, plot, save, export, {"--config": config_file})
    trainers: list[Trainer] = []
    with resumable(lambda: trainers[0].saved if trainers else None, plot, export):
        data = load(config.data, config.data_dir)
        for norm in COMPARED[config.model] if compare else [config.norm]:
            zero_gamma = config.zero_gamma and norm != "none"
            trainers.append(Trainer(replace(config, norm=norm, zero_gamma=zero_gamma), data))
        for trainer in trainers:
            if compare:
                print(f"{trainer.name}:")
            try:
                trainer.run(save)
            except DivergedError as error:
                if trainer is trainers[0]:
                    raise
                print(error)  # what a network without norm may come to is worth seeing
        tell(*trainers, plot=plot, export=export)
    return 0
