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
from fastbn.cli.ranks import add_mpi_options, ranks
from fastbn.cli.results import add_file_options, check_files, resumable, tell
from fastbn.demo import DemoError
from fastbn.demo.config import COMPARED, configure
from fastbn.demo.data import load
from fastbn.demo.train import DivergedError, Trainer


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
    add_mpi_options(parser)


def run(
    *,
    plot: Path | None = None,
    compare: bool = False,
    save: Path | None = None,
    export: Path | None = None,
    mpi: bool = False,
    **given: Any,
) -> int:
    """Train one network, or several to compare; with `mpi` together with the other ranks."""
    if given.get("local_norm") and not mpi:
        raise DemoError("--local-norm: expected --mpi as well")
    with ranks(mpi) as comm:
        return _train(comm, plot, compare, save, export, given)


def _train(
    comm: Any,
    plot: Path | None,
    compare: bool,
    save: Path | None,
    export: Path | None,
    given: dict[str, Any],
) -> int:
    fields = read_network_options(given)
    if compare:
        if save or export or "norm" in fields:
            raise DemoError("--compare: cannot be used with --norm, --save or --export")
        plot = plot or Path("compare.png")
    config = configure(fields)
    if comm and comm.rank:
        plot = save = export = None
    check_files(config, plot, save, export, {"--config": given.get("config")})
    trainers: list[Trainer] = []
    with resumable(lambda: trainers[0].saved if trainers else None, plot, export, comm):
        data = load(config.data, config.data_dir)
        for norm in COMPARED[config.model] if compare else [config.norm]:
            zero_gamma = config.zero_gamma and norm != "none"
            local_norm = config.local_norm and norm == "batch"
            changed = replace(config, norm=norm, zero_gamma=zero_gamma, local_norm=local_norm)
            trainers.append(Trainer(changed, data))
            if comm:
                trainers[-1].join(comm)
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
