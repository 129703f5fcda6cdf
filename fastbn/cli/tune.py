"""The search of `fastbn.tune`, over the options of the network."""

import argparse

from fastbn.cli.network import add_network_options
from fastbn.tune import command

run = command.run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.add_options(parser)
    add_network_options(parser, optimizer="momentum")
