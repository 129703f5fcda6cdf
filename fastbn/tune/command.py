"""Look for good hyper-parameters of the network of `fastbn train`, or of MODULE:FUNCTION.

What has an option below keeps that value; the others are tuned, in this order of importance: lr;
momentum, units, batch_size; layers, decay_rate. A small budget tunes the first ones only: there are
at least 6 trials for each. A configuration is chosen by its loss on the validation examples, the
mean of several networks; the accuracy on the test examples is told once, at the end, for it and for
the default. The same command resumes a study, and joins it from elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from fastbn.demo import DemoError, require
from fastbn.demo.config import Config, option
from fastbn.demo.files import check_writable, refusals
from fastbn.tune import network, report
from fastbn.tune.rounds import SAMPLERS, Objective, ranked
from fastbn.tune.search import Result, search, told, tuned_of
from fastbn.tune.show import listed
from fastbn.tune.space import Scale, tiers_of
from fastbn.tune.storage import raised_by_objective

OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "trials": (int, "N", "on all machines together (default: 40)"),
    "rounds": (int, "N", "each after the first searches around the best few so far (default: 2,"
               " and 1 for tpe and cmaes)"),
    "sampler": (str, "|".join(SAMPLERS), "default: random"),
    "also": (lambda text: text.split(","), "beta1,beta2,eps", "tune these of Adam's as well"),
    "workers": (int, "N", "processes on this machine (default: 1)"),
    "storage": (str, "URL", "a file, sqlite:///FILE, postgresql://... or grpc://HOST:PORT"
                " (default: the file journal in the folder of --out)"),
    "study": (str, "NAME", "its name in the storage (default: study)"),
    "out": (Path, "FOLDER", "where the results go (default: tune)"),
}  # fmt: skip
FASTBN = (sys.executable, "-m", "fastbn")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the search; those of the network are `fastbn train`'s."""
    parser.description = __doc__
    text = "a function of a dict that returns what is to be small, or yields it epoch by epoch;"
    text += " the module has its `space`, and may have a `start`: see fastbn.tune.search"
    parser.add_argument("objective", nargs="?", metavar="MODULE:FUNCTION", help=text)
    group = parser.add_argument_group("search")
    for name, (kind, metavar, text) in OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)


def run(words: Sequence[str], **given: Any) -> int:
    """Search, write the report, and return the exit status.

    Parameters
    ----------
    words : sequence of str
        The command line, to be told after Ctrl-C.
    **given
        Its options: objective, also, out, fields of `Config`, arguments of `search`.

    Raises
    ------
    DemoError
        If something is wrong that the user can mend. The traceback of an exception of the user's
        code is printed before.
    KeyboardInterrupt
        After Ctrl-C, with how to go on.
    """
    try:
        _run(**given)
    except KeyboardInterrupt:
        again = shlex.join([*FASTBN, *words])
        text = f"the finished trials are kept; resume with\n{again}"
        raise KeyboardInterrupt(text) from None
    except (Exception, SystemExit) as error:
        known = told(error) if raised_by_objective(error) else error
        if not isinstance(known, DemoError):
            raise
        with suppress(OSError):  # nobody can be told then
            print(*getattr(known, "__notes__", ()), sep="", end="", file=sys.stderr)
        raise known from None
    return 0


def _run(
    objective: str | None = None,
    also: Sequence[str] = (),
    seed: int = 0,
    out: Path = Path("tune"),
    **given: Any,
) -> None:
    for module in ("optuna", "rich", "matplotlib"):
        require(module, "tune")
    fields = {field.name for field in dataclasses.fields(Config)}
    fixed = {name: given.pop(name) for name in list(given) if name in fields}
    function: Objective
    if objective is not None:
        for name in (*fixed, *(("also",) if also else ())):
            raise DemoError(f"{option(name)}: cannot be used with MODULE:FUNCTION")
        with chdir("."):  # the module, and the objective, may go elsewhere
            function, tiers, start = _imported(objective)
    else:
        if seed:
            fixed["seed"] = seed
        demo = {**network.GIVEN, **fixed}
        tiers = network.space_of(demo, also)
        start = network.start_of(demo, [name for tier in tiers for name in tier])
        network.networks(network.config_of(demo, start))  # what is wrong with them is found out
        function = network.ValidationLoss(demo)
    with refusals(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "best.json", option="--out")
    given = {"trials": 40, "storage": str(out / "journal"), **given}
    print(_what_is_tuned(tiers, given["trials"]), flush=True)
    with chdir("."):
        result = search(function, tiers, start=start, seed=seed, **given)
    _tell(result)
    if objective is None:
        chosen = network.config_of(demo, result.best)
        best = dataclasses.asdict(chosen)
        if "data_dir" not in fixed:
            del best["data_dir"]  # a folder of this machine
        files = report.write(out, result, best, "validation loss")
        _test({"the chosen": chosen, "the default": network.default_of(fixed, start)})
        train = shlex.join([*FASTBN, "train", "--config", str(out / "best.json")])
        print(f"train it: {train}")
    else:
        files = report.write(out, result, result.best)
    print(f"written to {out}: {', '.join(file.name for file in files)}")


def _imported(text: str) -> tuple[Objective, list[dict[str, Scale]], Any]:
    """Return the function that MODULE:FUNCTION names, and its module's space and start."""
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise DemoError(f"MODULE:FUNCTION: expected a module and a function, got {text!r}")
    here = str(Path.cwd())  # not "": a worker would take that for the folder of its own start
    if here not in sys.path:
        sys.path.insert(0, here)  # where `fastbn` is a script, the folder one works in is not there
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name + ".").startswith(missing + "."):
            raise DemoError(f"MODULE:FUNCTION: {error}") from None
        raise told(error, f"MODULE:FUNCTION: {module_name}") from None
    for needed in (name, "space"):
        if not hasattr(module, needed):
            raise DemoError(f"MODULE:FUNCTION: {module_name} has no {needed!r}")
    function: Objective = getattr(module, name)
    if not callable(function):
        raise DemoError(f"MODULE:FUNCTION: expected a function, got {function!r}")
    try:
        return function, tiers_of(module.space), getattr(module, "start", None)
    except (TypeError, ValueError) as error:
        raise DemoError(f"MODULE:FUNCTION: {module_name}: {error}") from error


def _what_is_tuned(tiers: list[dict[str, Scale]], trials: int) -> str:
    tuned = tuned_of(tiers, trials)
    names = "; ".join(", ".join(tier) for tier in tiers if tier.keys() <= tuned.keys())
    held = ", ".join(name for tier in tiers for name in tier if name not in tuned)
    few = f"\nheld, as {trials} trials are few: {held}" if held else ""
    return f"tuned, most important first: {names}{few}"


def _tell(result: Result) -> None:
    """Print the best trial, and the measured importances beside the expected order."""
    best = ranked(result.trials)[0]
    states = [r.state for r in result.trials]
    complete, pruned, failed = (states.count(state) for state in ("complete", "pruned", "failed"))
    reasons = ", ".join(dict.fromkeys(r.reason for r in result.trials if r.reason))
    why = reasons and f" ({reasons})"
    print(
        f"{len(states)} trials: {complete} complete, {pruned} stopped early, {failed} failed{why}"
    )
    print(f"best: {result.value:.4g}, trial {best.number} of round {best.round}")
    print(f"  {listed(result.best)}")
    measured = result.importances
    if measured:
        print("importance (share of the order of the trials, by tier):")
    else:
        print("importance: cannot be told from these trials")
    for index, tier in enumerate(result.tiers, 1):
        if text := ", ".join(f"{n} {measured[n]:.2f}" for n in tier if n in measured):
            print(f"  {index}. {text}")


def _test(configs: Mapping[str, Config]) -> None:
    """Print the accuracies on the test examples, which nothing was chosen by."""
    print(f"test accuracy, mean of {network.REPEATS} networks (from the lowest to the highest):")
    for name, config in configs.items():
        found = network.test_accuracies(config)
        print(f"  {name:12} {fmean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
