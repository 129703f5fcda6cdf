"""The demo's network as something to tune: its space, in the order of importance, and its loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from fastbn.demo import DemoError
from fastbn.demo.config import OPTIMIZER, Config, configure
from fastbn.demo.data import load
from fastbn.demo.train import DivergedError, Trainer, one_blas_thread
from fastbn.tune.space import Params, Scale, choice, integer, log_uniform, one_minus_log_uniform
from fastbn.tune.space import uniform as even

# A trial trains this many networks, which differ in their random numbers only: the loss of a single
# one tells as much about its seed as about its hyper-parameters.
REPEATS = 5
# Tuned only when asked for.
OF_ADAM = {
    "beta1": one_minus_log_uniform(0.9, 0.999),
    "beta2": one_minus_log_uniform(0.9, 0.9999),
    "eps": log_uniform(1e-9, 1e-3),
}

# Tuned where the course tunes it: with momentum, which Adam has no single one of.
GIVEN = {"optimizer": "momentum"}

_data = lru_cache(maxsize=1)(load)


def space_of(given: Mapping[str, Any], also: Collection[str]) -> list[dict[str, Scale]]:
    """Return the space, most important tier first, without what is given.

    Parameters
    ----------
    given : mapping
        Fields of `Config` that are not to be tuned.
    also : collection of str
        Which of beta1, beta2 and eps are to be tuned.

    Raises
    ------
    DemoError
        If the optimizer has no such, or nothing is left to tune.
    """
    config = configure(given)
    used = OPTIMIZER.get(config.optimizer, {})
    possible = [name for name in OF_ADAM if name in used and name not in given]
    for name in also:
        if name not in possible:
            expected = f"{', '.join(possible) or 'nothing'} with --optimizer {config.optimizer}"
            raise DemoError(f"--also: expected {expected}, got {name}")
    mlp = config.model == "mlp"
    batches = _batch_sizes(config)
    decays = {
        "inverse": log_uniform(0.1, 10),
        "exponential": one_minus_log_uniform(0.7, 0.99),
        "staircase": even(0.1, 0.9),
    }
    tiers: list[dict[str, Scale | None]] = [
        {"lr": log_uniform(1e-4, 1)},
        {
            "momentum": one_minus_log_uniform(0.9, 0.999) if "momentum" in used else None,
            "units": integer(32, 512) if mlp else integer(4, 32),
            "batch_size": choice(*batches) if batches else None,
        },
        {"layers": integer(1, 4 if mlp else 3), "decay_rate": decays.get(config.lr_decay)},
        {name: scale for name, scale in OF_ADAM.items() if name in also},
    ]
    fixed = {*given, *(("units", "layers") if "hidden" in given else ())}
    left = [{n: s for n, s in tier.items() if s and n not in fixed} for tier in tiers]
    if not any(left):
        raise DemoError("nothing is left to tune: every hyper-parameter has an option of its own")
    return [tier for tier in left if tier]


def _batch_sizes(config: Config) -> list[int]:
    return [n for n in (16, 32, 64, 128) if n <= len(data_of(config).train[0])]


def start_of(given: Mapping[str, Any], names: Collection[str]) -> Params:
    """Return the default values of the hyper-parameters to tune."""
    config = configure(given)
    values = {**vars(config), "units": config.hidden[0], "layers": len(config.hidden)}
    if "batch_size" in names:  # the default is too large for few examples
        values["batch_size"] = min(config.batch_size, _batch_sizes(config)[-1])
    return {name: values[name] for name in names}


def default_of(fixed: Mapping[str, Any], start: Params) -> Config:
    """Return what ``fastbn train`` would train with the same options."""
    sizes = {name: start[name] for name in ("batch_size",) if name in start}
    given = {**GIVEN, **fixed} if "momentum" in fixed else fixed
    return configure({**given, **sizes})


def config_of(given: Mapping[str, Any], params: Params) -> Config:
    """Return the configuration that a trial stands for.

    From layer to layer the mlp halves its units, the resnet doubles its channels, as by default.
    """
    fields: dict[str, Any] = {**given, **params}
    if "units" in fields:
        units, layers = fields.pop("units"), range(fields.pop("layers"))
        mlp = fields.get("model", "mlp") == "mlp"
        fields["hidden"] = tuple(units >> n if mlp else units << n for n in layers)
    return configure(fields)


def data_of(config: Config) -> Any:
    """Return the data of a configuration, read once."""
    return _data(config.data, config.data_dir)


@dataclass(frozen=True, repr=False)
class ValidationLoss:
    """Yields the loss on the validation examples, epoch by epoch, the mean of several networks.

    The loss is finer than the accuracy, which on a hundred examples moves in steps of 1%.
    """

    given: dict[str, Any]

    def __repr__(self) -> str:
        """Tell the plan without the folders of this machine."""
        fields = {name: value for name, value in self.given.items() if name != "data_dir"}
        if "data" in fields:
            fields["data"] = Path(fields["data"]).name
        return f"the demo network with {fields}"

    def __call__(self, params: Params) -> Iterator[float]:
        """Train networks with these hyper-parameters."""
        trainers = networks(config_of(self.given, params))
        for _ in range(trainers[0].config.epochs):
            try:
                yield fmean(epoch["validation_loss"] for epoch in map(_train_epoch, trainers))
            except DivergedError:
                yield math.inf
                return


def networks(config: Config) -> list[Trainer]:
    """Return untrained networks of a configuration; the first is that of ``fastbn train``."""
    seeds = range(config.seed, config.seed + REPEATS)
    return [Trainer(replace(config, seed=seed), data_of(config)) for seed in seeds]


def test_accuracies(config: Config) -> list[float]:
    """Train networks and return their accuracy on the test examples; 0 if they diverge."""
    accuracies = []
    for trainer in networks(config):
        try:
            for _ in range(config.epochs):
                _train_epoch(trainer)
            accuracies.append(trainer.evaluate(trainer.data.test)[1])
        except DivergedError:
            accuracies.append(0.0)
    return accuracies


def _train_epoch(trainer: Trainer) -> dict[str, float]:
    with one_blas_thread():  # as `Trainer.run` has it, for the same bits
        trainer.history.append(trainer.train_epoch())
    return trainer.history[-1]
