"""``python -m fastbn tune``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastbn.demo import DemoError, require
from fastbn.demo.files import check_writable
from fastbn.demo.train import Config, configure, option
from fastbn.tune import network, report
from fastbn.tune.rounds import SAMPLERS, Objective
from fastbn.tune.search import Result, search, tuned_of
from fastbn.tune.show import listed
from fastbn.tune.space import Scale, Space, tiers_of

DESCRIPTION = """
Look for good hyper-parameters of the network of `fastbn train`, or of MODULE:FUNCTION. What has an
option below keeps that value; the others are tuned, in this order of importance: lr; momentum,
units, batch_size; layers, decay_rate. A small budget tunes the first ones only: there are at least
6 trials for each. A configuration is chosen by its loss on the validation examples, the mean of
several networks; the accuracy on the test examples is told once, at the end, for it and for the
default. The same command resumes a study, and joins it from elsewhere.
"""
# Tuned where the course tunes it: with momentum, which Adam has no single one of.
GIVEN = {"optimizer": "momentum"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the search; those of the network are `fastbn train`'s."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "objective",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="a function of a dict that returns what is to be small, or yields it epoch by epoch;"
        " the module has its `space`, and may have a `start`: see fastbn.tune.search",
    )
    add = parser.add_argument_group("search").add_argument
    add("--trials", type=int, metavar="N", help="on all machines together (default: 40)")
    add(
        "--rounds",
        type=int,
        metavar="N",
        help="each after the first searches around the best few so far (default: 2, and 1 for tpe"
        " and cmaes)",
    )
    add("--sampler", metavar="|".join(SAMPLERS), help="default: random")
    add("--also", type=_names, metavar="beta1,beta2,eps", help="tune these of Adam's as well")
    add("--workers", type=int, metavar="N", help="processes on this machine (default: 1)")
    add(
        "--storage",
        metavar="URL",
        help="a file, sqlite:///FILE, postgresql://... or grpc://HOST:PORT (default: the file"
        " journal in the folder of --out)",
    )
    add("--study", metavar="NAME", help="its name in the storage (default: study)")
    add("--out", type=Path, metavar="FOLDER", help="where the results go (default: tune)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def run(
    words: Sequence[str],
    *,
    objective: str | None = None,
    trials: int = 40,
    out: Path = Path("tune"),
    also: tuple[str, ...] = (),
    storage: str | None = None,
    seed: int = 0,
    **given: Any,
) -> int:
    """Search, write the report, and return the exit status.

    Parameters
    ----------
    words : sequence of str
        The command line, to be told after Ctrl-C.
    objective, trials, out, also, storage, seed, **given
        Its options; given has fields of `Config` and the other arguments of `search`.
    """
    fields = {field.name for field in dataclasses.fields(Config)}
    fixed = {name: given.pop(name) for name in list(given) if name in fields}
    try:
        for module in ("optuna", "rich", "matplotlib"):
            require(module, "tune")
        function: Objective
        start = None
        if objective is not None:
            for name in (*fixed, *(("also",) if also else ())):
                raise DemoError(f"{option(name)}: cannot be used with MODULE:FUNCTION")
            function, tiers, start = _imported(objective)
        else:
            fixed = {**fixed, **({"seed": seed} if seed else {})}
            network.networks(configure(fixed))  # what is wrong with them is found out here
            demo = {**GIVEN, **fixed}
            tiers = network.space_of(demo, also)
            start = network.start_of(demo, [name for tier in tiers for name in tier])
            function = network.ValidationLoss(demo)
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out / "best.json", option="--out")
        print(_what_is_tuned(tiers, trials), flush=True)
        result = search(
            function,
            tiers,
            start=start,
            trials=trials,
            storage=storage or str(out / "journal"),
            seed=seed,
            **given,
        )
        _tell(result)
        if objective is None:
            chosen = network.config_of(demo, result.best)
            best = dataclasses.asdict(chosen)
            if "data_dir" not in fixed:
                del best["data_dir"]  # a folder of this machine
            files = report.write(out, result, best, "validation loss")
            _test({"the chosen": chosen, "the default": configure(fixed)})
            command = [sys.executable, "-m", "fastbn", "train", "--config", str(out / "best.json")]
            print(f"train it: {shlex.join(command)}")
        else:
            files = report.write(out, result, result.best)
        print(f"written to {out}: {', '.join(file.name for file in files)}")
    except DemoError as error:
        print(f"fastbn tune: error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(note, end="", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fastbn tune: error: --out {out}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join([sys.executable, "-m", "fastbn", *words])
        print("\ninterrupted: the finished trials are kept; resume with", file=sys.stderr)
        print(again, file=sys.stderr)
        return 130
    return 0


def _imported(text: str) -> tuple[Objective, list[dict[str, Scale]], Any]:
    """Return the function that MODULE:FUNCTION names, and its module's space and start."""
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise DemoError(f"MODULE:FUNCTION: expected a module and a function, got {text!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # where `fastbn` is a script, the folder one works in is not there
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise DemoError(f"MODULE:FUNCTION: {error}") from None
        raise
    for needed in (name, "space"):
        if not hasattr(module, needed):
            raise DemoError(f"MODULE:FUNCTION: {module_name} has no {needed!r}")
    function: Objective = getattr(module, name)
    if not callable(function):
        raise DemoError(f"MODULE:FUNCTION: expected a function, got {function!r}")
    space: Space = module.space
    try:
        return function, tiers_of(space), getattr(module, "start", None)
    except (TypeError, ValueError) as error:
        raise DemoError(f"MODULE:FUNCTION: {module_name}: {error}") from error


def _what_is_tuned(tiers: list[dict[str, Scale]], trials: int) -> str:
    tuned = tuned_of(tiers, trials)
    text = "tuned, most important first: "
    text += "; ".join(", ".join(tier) for tier in tiers if tier.keys() <= tuned.keys())
    held = [name for tier in tiers for name in tier if name not in tuned]
    if held:
        text += f"\nheld, as {trials} trials are few: {', '.join(held)}"
    return text


def _tell(result: Result) -> None:
    """Print the best trial, and the measured importances beside the expected order."""
    best = next(r for r in result.trials if r.params == result.best and r.value == result.value)
    states = [r.state for r in result.trials]
    print(
        f"{len(states)} trials: {states.count('complete')} complete, {states.count('pruned')}"
        f" stopped early, {states.count('failed')} failed"
    )
    print(f"best: {result.value:.4g}, trial {best.number} of round {best.round}")
    print(f"  {listed(result.best)}")
    measured = result.importances
    if measured:
        print("importance (share of the order of the trials, by tier):")
        for index, tier in enumerate(result.tiers, 1):
            shares = (f"{name} {measured[name]:.2f}" for name in tier if name in measured)
            if text := ", ".join(shares):
                print(f"  {index}. {text}")


def _test(configs: Mapping[str, Config]) -> None:
    """Print the accuracies on the test examples, which nothing was chosen by."""
    print(f"test accuracy, mean of {network.REPEATS} networks (from the lowest to the highest):")
    for name, config in configs.items():
        found = network.test_accuracies(config)
        print(f"  {name:12} {fmean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
