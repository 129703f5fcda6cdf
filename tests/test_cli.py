"""The command line: output, exit statuses, every error, Ctrl-C."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from support import write_blobs

import fastbn
from fastbn.cli import main
from fastbn.demo import config as demo_config
from fastbn.demo import train
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.train import Trainer

LAST_LINE = re.compile(r"test accuracy: (\d\.\d{2,})")


@pytest.fixture
def blobs(tmp_path):
    """Return options to train a small network shortly, on data that are easy to learn."""
    for module in ("safetensors", "tqdm", "threadpoolctl"):
        pytest.importorskip(module)
    return ["train", "--data", write_blobs(tmp_path), "--hidden", "8,8", "--epochs", "3"]


def run(argv, capsys):
    """Return exit status, output and errors of a command."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in argv])
    except SystemExit as exit_:
        status = exit_.code or 0
    return status, *capsys.readouterr()


def command(*argv):
    """Return what starts a command in a process of its own."""
    path = [str(Path(fastbn.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return {"args": [sys.executable, "-m", "fastbn", *map(str, argv)], "env": environment}


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000


def test_info_prints_all_there_is_to_know(capsys):
    status, out, err = run(["info"], capsys)
    assert (status, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines.keys() == fastbn.runtime_info().keys()
    assert lines["numpy"] == np.__version__
    assert lines["isa"] in lines["available_isas"].split(", ")


def test_info_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('filelock', 'matplotlib', 'mlxtend', 'safetensors', 'sklearn',"
        " 'threadpoolctl', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "from fastbn.cli import main\n"
        "assert main(['info']) == 0\n"
        "assert not any(name.startswith('fastbn.demo') for name in sys.modules)\n"
    )
    process = command()
    process["args"] = [sys.executable, "-c", code]
    subprocess.run(**process, check=True, stdout=subprocess.DEVNULL)


def test_version(capsys):
    assert run(["--version"], capsys) == (0, f"fastbn {fastbn.__version__}\n", "")


FIELDS = [
    demo_config.option(field.name) for field in fields(demo_config.Config) if field.metadata["help"]
]
FILES = ["--plot", "--save", "--export"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", [*FIELDS, *FILES, "--compare", "--config", "--mpi", "--local-norm"]),
        ("watch", [*FIELDS, "FOLDER", "--config"]),
        ("resume", [*FILES, "FILE|FOLDER", "--epochs", "--mpi"]),
        ("replay", ["FOLDER"]),
        ("nudge", ["FOLDER", "--rollback", "--lr", "--momentum", "--stop"]),
        ("info", []),
    ],
)
def test_help_names_every_option(command, options, capsys):
    status, out, _ = run([command, "--help"], capsys)
    assert status == 0
    for option in options:
        assert f"  {option}" in out
    assert f"\n    {command} " in run(["--help"], capsys)[1]


def test_help_tells_the_true_defaults(capsys):
    words = " ".join(run(["train", "--help"], capsys)[1].split())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in demo_config.LR.items())
    assert f"(default: {rates})" in words
    for optimizer, values in demo_config.OPTIMIZER.items():
        for name, value in values.items():
            assert re.search(
                f"--{name} \\w+ of (the optimizer )?{optimizer} .default: {value}.", words
            )
    decays = ", ".join(f"{name} {rate:g}" for name, rate in demo_config.DECAY_RATE.items())
    assert f"(default: {decays})" in words
    for options in (["mlp"], ["resnet"]):
        hidden = ",".join(map(str, demo_config.HIDDEN[options[0]]))
        assert f"of the {options[0]} (default: {hidden})" in words
    epochs = ", ".join(f"{name} {count}" for name, count in demo_config.EPOCHS.items())
    assert f"default: {epochs}" in words


def test_the_module_runs(blobs):
    done = subprocess.run(
        **command(*blobs), check=True, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stderr == ""
    assert LAST_LINE.fullmatch(done.stdout.splitlines()[-1])


def test_the_default_learns_digits(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    status, out, err = run(["train"], capsys)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 21
    assert float(LAST_LINE.fullmatch(out.splitlines()[-1])[1]) >= 0.97


def test_the_resnet_learns_digits(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    status, out, _ = run(["train", "--model", "resnet", "--epochs", 3], capsys)
    assert status == 0
    assert float(LAST_LINE.fullmatch(out.splitlines()[-1])[1]) >= 0.95


def test_the_seed_decides_every_bit(blobs, capsys):
    one, same, other = (run([*blobs, "--seed", seed], capsys) for seed in (4, 4, 5))
    assert one == same
    assert one != other


def test_every_option_arrives(blobs, tmp_path, capsys):
    file = tmp_path / "run"
    options = "--model resnet --norm instance --zero-gamma --hidden 4 --optimizer momentum"
    options += " --lr 0.01 --momentum 0.8"
    options += " --lr-decay staircase --decay-rate 0.25 --batch-size 20 --epochs 2 --seed 3"
    options += f" --data-dir {tmp_path} --save {file}"
    status, _, err = run([*blobs, *options.split()], capsys)
    assert (status, err) == (0, "")
    config = load_checkpoint(file, {}).config
    assert config == demo_config.Config(
        data=str(tmp_path / "blobs.npz"),
        data_dir=str(tmp_path),
        model="resnet",
        norm="instance",
        zero_gamma=True,
        hidden=(4,),
        optimizer="momentum",
        lr=0.01,
        momentum=0.8,
        beta1=None,
        beta2=None,
        eps=None,
        lr_decay="staircase",
        decay_rate=0.25,
        batch_size=20,
        epochs=2,
        seed=3,
    )


def test_a_configuration_from_a_file(blobs, tmp_path, capsys):
    path, saves = tmp_path / "c.json", [tmp_path / "1", tmp_path / "2"]
    path.write_text('{"optimizer": "adam", "lr": 1, "beta1": 0.8, "hidden": [4, 4], "epochs": 2}')
    options = "--optimizer adam --beta1 0.8 --hidden 8,8 --epochs 3 --lr 0.1"
    both = [
        run([*blobs, "--config", path, "--lr", "0.1", "--save", saves[0]], capsys),
        run([*blobs, *options.split(), "--save", saves[1]], capsys),
    ]
    assert both[0][0] == 0
    assert both[0] == both[1]  # what is given on the command line wins
    one, other = (load_checkpoint(save, {}).config for save in saves)
    assert one == other
    assert (one.lr, one.beta1, one.beta2, one.hidden) == (0.1, 0.8, 0.999, (8, 8))


def test_plot(blobs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    status, out, err = run([*blobs, "--plot", path], capsys)
    assert (status, err) == (0, "")
    assert out.splitlines()[-2] == f"curves: {path}"
    assert is_png(path)


def test_compare(blobs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    status, out, err = run([*blobs, "--compare", "--epochs", 8], capsys)
    assert (status, err) == (0, "")
    assert is_png(tmp_path / "compare.png")
    lines = out.splitlines()
    assert lines[0] == "with batch norm:"
    assert lines[9] == "without norm:"
    assert lines[-4] == "curves: compare.png"
    reached = r"95% validation accuracy (reached in epoch \d|not reached); on test (\d\.\d{4})"
    assert re.fullmatch(f"without norm: {reached}", lines[-2])
    with_norm = re.fullmatch(f"with batch norm: {reached}", lines[-3])
    assert LAST_LINE.fullmatch(lines[-1])[1] == with_norm[2]


def test_compare_of_resnets_has_instance_norm_too(blobs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    options = [*blobs, "--compare", "--model", "resnet", "--zero-gamma", "--epochs", 1]
    status, out, err = run(options, capsys)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    names = ["with batch norm:", "with instance norm:", "without norm:"]
    assert lines[0:6:2] == names
    assert [line.partition(" 95%")[0] for line in lines[-4:-1]] == names


def test_export(blobs, tmp_path, capsys):
    pytest.importorskip("safetensors")
    path, file = tmp_path / "weights.safetensors", tmp_path / "run"
    status, out, err = run([*blobs, "--export", path, "--save", file], capsys)
    assert (status, err) == (0, "")
    told, named, _ = out.splitlines()[-3:]
    assert told.startswith("predictions of the folded network: 28 of 28 the same; its logits")
    assert named == f"weights: {path}"
    content = path.read_bytes()
    path.unlink()
    assert run(["train", "--resume", file, "--export", path], capsys)[1].splitlines()[0] == told
    assert path.read_bytes() == content


def test_export_without_safetensors(blobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    status, out, err = run([*blobs, "--export", tmp_path / "w.safetensors"], capsys)
    assert (status, out) == (2, "")
    assert err.endswith('None in sys.modules: pip install "fastbn[io]"\n')


def test_compare_goes_on_when_only_the_plain_network_diverges(blobs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    train_epoch = Trainer.train_epoch

    def diverging(self, title):
        if self.config.norm == "none":
            raise train.DivergedError("the loss is not finite any more")
        return train_epoch(self, title)

    monkeypatch.setattr(Trainer, "train_epoch", diverging)
    path = tmp_path / "curves.png"
    status, out, err = run([*blobs, "--compare", "--plot", path], capsys)
    assert (status, err) == (0, "")
    assert "without norm:\nthe loss is not finite any more\n" in out
    assert "without norm: 95% validation accuracy not reached; on test" in out
    assert is_png(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hidden 8,x", "argument --hidden: expected positive integers like 256,128, got '8,x'"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--model cnn", "--model: expected mlp or resnet, got 'cnn'"),
        ("--norm layer", "--norm: expected batch or instance or none, got 'layer'"),
        ("--epochs 0", "--epochs: expected an integer from 1, got 0"),
        ("--lr -1", "--lr: expected a positive number, got -1.0"),
        (
            "--data cifar",
            "--data: expected digits, mnist5k, fashion-mnist or FILE.npz, got 'cifar'",
        ),
        ("--data none.npz", "no such file"),
        (
            "--data fashion-mnist --data-dir none",
            "train-images-idx3-ubyte, gzipped or not, is miss",
        ),
        ("--plot curves.pdf", "--plot: expected the name of a .png file, got curves.pdf"),
        ("--plot none/curves.png", "--plot none/curves.png: cannot be written"),
        ("--save none/run", "--save none/run: cannot be written"),
        ("--save .", "--save .: cannot be written: [Errno 17] expected a file, got a folder or"),
        ("--save BLOBS", "--save: expected another file than that of --data"),
        ("--compare --norm none", "--compare: cannot be used with --norm, --save or --export"),
        ("--compare --export w.safetensors", "--compare: cannot be used with"),
        ("--norm instance", "--norm: expected batch or none with --model mlp"),
        ("--zero-gamma", "--zero-gamma: expected --model resnet with a norm, got True"),
        ("--export w.npz", "--export: expected the name of a .safetensors file, got w.npz"),
        ("--export none/w.safetensors", "--export none/w.safetensors: cannot be written"),
        (
            "--model resnet --norm instance --export w.safetensors",
            "--export: expected --norm batch or none, as instance norm cannot be folded",
        ),
        ("--compare --save run", "--compare: cannot be used with"),
        ("--compare --resume run", "unrecognized arguments: --compare"),
        ("--resume none", "none: no such file"),
        ("--resume BLOBS", "not a checkpoint of `fastbn train --save`, or damaged"),
        ("--watch blobs.npz", "blobs.npz: cannot be written: "),
        ("--watch .", ".: expected a new or empty folder, got one with files"),
        ("--watch run --batch-size 500", "--batch-size: expected at most 101"),
        ("--watch run --compare", "unrecognized arguments: --compare"),
        ("--watch run --save a", "unrecognized arguments: --save a"),
        ("--watch run --plot a.png", "unrecognized arguments: --plot a.png"),
        ("--watch run --resume a", "argument --resume: not allowed with argument --watch"),
        ("--watch=run --replay=run", "argument --replay: not allowed with argument --watch"),
        ("--watch", "argument --watch: expected one argument"),
        *(
            (f"--resume . {o}", "cannot be used with a folder")
            for o in ("--plot a.png", "--save a")
        ),
        ("--resume .", ".: no run of `fastbn watch` there"),
        ("--replay run", "unrecognized arguments: --data"),
        ("--optimizer sgd --norm none --lr 1e30", "--lr 1e+30 is too high"),
        ("--config none.json", "--config none.json: no such file"),
        ("--config BLOBS", "--config blobs.npz: cannot be read as JSON: "),
        ("--momentum 0.5", "--momentum: expected nothing with --optimizer adam, got 0.5"),
        ("--beta1 0.5 --optimizer sgd", "--beta1: expected nothing with --optimizer sgd, got 0.5"),
        ("--optimizer momentum --momentum 1", "--momentum: expected a number in [0, 1), got 1.0"),
        ("--beta2 -0.1", "--beta2: expected a number in [0, 1), got -0.1"),
        ("--eps 0", "--eps: expected a positive number, got 0.0"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_errors_are_one_line(options, message, blobs, tmp_path, capsys, monkeypatch):
    if any(option in options for option in ("--plot", "--compare", "--watch", "--resume .")):
        pytest.importorskip("matplotlib")
    if "--export" in options:
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    words = [word.replace("BLOBS", "blobs.npz") for word in options.split()]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, out, err = run([*blobs, *words], capsys)
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"fastbn(?: train| watch| resume| replay)?: error: .*\n", err)
    assert message in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("argv", [[], ["fly"], ["info", "--fast"]])
def test_commands_that_do_not_exist(argv, capsys):
    status, out, err = run(argv, capsys)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"fastbn.*: error: .*\n", err)


@pytest.mark.parametrize("module", ["tqdm", "matplotlib"])
def test_a_missing_extra(module, blobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    status, _, err = run([*blobs, "--plot", tmp_path / "curves.png"], capsys)
    assert status == 2
    assert err.startswith("fastbn train: error: ")
    assert err.endswith(f'{module} halted; None in sys.modules: pip install "fastbn[demo]"\n')


def test_a_disk_that_fills_up(blobs, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = run([*blobs, "--save", tmp_path / "saved"], capsys)
    assert (status, out) == (2, "")
    assert err.endswith("saved: cannot be written: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("run", "expected --lr, --momentum, --rollback or --stop, got none of them"),
        ("run --lr 0", "--lr: expected a positive number, got 0.0"),
        ("run --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("run --momentum 1", "--momentum: expected a number from 0 to below 1, got 1.0"),
        ("run --rollback -1", "--rollback: expected an epoch, or 0 for the start, got -1"),
        ("run --rollback last", "argument --rollback: invalid int value: 'last'"),
        ("run --stop", "run: no run of `fastbn watch` there"),
        ("--stop", "the following arguments are required: FOLDER"),
    ],
)
def test_nudges_that_are_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["nudge", *options.split()], capsys)
    assert (status, out, err) == (2, "", f"fastbn nudge: error: {message}\n")
    assert list(tmp_path.iterdir()) == []
