"""The command line: output, exit statuses, every error, Ctrl-C."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import write_blobs

import fastbn
from fastbn.cli import main
from fastbn.demo import train
from fastbn.demo.train import Trainer, load_checkpoint
from fastbn.demo.watch import Log

LAST_LINE = re.compile(r"test accuracy: (\d\.\d{2,})")


@pytest.fixture
def blobs(tmp_path):
    """Return options to train a small network shortly, on data that are easy to learn."""
    for module in ("tqdm", "threadpoolctl"):
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
        "for name in ('sklearn', 'matplotlib', 'tqdm', 'threadpoolctl', 'mlxtend'):\n"
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


def test_help_names_every_option(capsys):
    status, out, _ = run(["train", "--help"], capsys)
    assert status == 0
    fields = [train.option(name) for name in train.Config.__dataclass_fields__]
    files = ["--plot", "--compare", "--save", "--resume", "--watch", "--replay", "--export"]
    for option in [*fields, *files]:
        assert f"  {option}" in out


def test_help_tells_the_true_defaults(capsys):
    words = " ".join(run(["train", "--help"], capsys)[1].split())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in train.LR.items())
    assert f"(default: {rates})" in words
    decays = ", ".join(f"{name} {rate:g}" for name, rate in train.DECAY_RATE.items())
    assert f"(default: {decays})" in words
    for options in (["mlp"], ["resnet"]):
        hidden = ",".join(map(str, train.HIDDEN[options[0]]))
        assert f"of the {options[0]} (default: {hidden})" in words
    epochs = ", ".join(f"{name} {count}" for name, count in train.EPOCHS.items())
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
    file = tmp_path / "run.npz"
    options = (
        "--model resnet --norm instance --zero-gamma --hidden 4 --optimizer momentum --lr 0.01"
    )
    options += " --lr-decay staircase --decay-rate 0.25 --batch-size 20 --epochs 2 --seed 3"
    options += f" --data-dir {tmp_path} --save {file}"
    status, _, err = run([*blobs, *options.split()], capsys)
    assert (status, err) == (0, "")
    config = load_checkpoint(file, {}).config
    assert config == train.Config(
        data=str(tmp_path / "blobs.npz"),
        data_dir=str(tmp_path),
        model="resnet",
        norm="instance",
        zero_gamma=True,
        hidden=(4,),
        optimizer="momentum",
        lr=0.01,
        lr_decay="staircase",
        decay_rate=0.25,
        batch_size=20,
        epochs=2,
        seed=3,
    )


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
    path, file = tmp_path / "weights.safetensors", tmp_path / "run.npz"
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


IN_A_FOLDER = "a run in a folder: --watch and --resume cannot be used with each other, --plot,"


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
        ("--save none/run.npz", "--save none/run.npz: cannot be written"),
        ("--save .", "--save .: cannot be written: [Errno 17] expected a file, got a folder or"),
        ("--save BLOBS", "--save: expected another file than that of --data"),
        ("--compare --norm none", "--compare: cannot be used with --norm, --save, --resume or"),
        ("--compare --export w.safetensors", "--compare: cannot be used with"),
        ("--norm instance", "--norm: expected batch or none with --model mlp"),
        ("--zero-gamma", "--zero-gamma: expected --model resnet with a norm, got True"),
        ("--export w.npz", "--export: expected the name of a .safetensors file, got w.npz"),
        ("--export none/w.safetensors", "--export none/w.safetensors: cannot be written"),
        (
            "--model resnet --norm instance --export w.safetensors",
            "--export: expected --norm batch or none, as instance norm cannot be folded",
        ),
        ("--compare --save run.npz", "--compare: cannot be used with"),
        ("--compare --resume run.npz", "--compare: cannot be used with"),
        ("--resume none.npz", "--resume none.npz: no such file"),
        ("--resume BLOBS", "not a checkpoint of `fastbn train --save`, or damaged"),
        ("--watch blobs.npz", "--watch blobs.npz: "),
        ("--watch .", "--watch .: expected a new or empty folder, got one with files"),
        ("--watch run --batch-size 500", "--batch-size: expected at most 101"),
        *((f"--watch run {other}", IN_A_FOLDER) for other in ("--compare", "--save run.npz")),
        *((f"--watch run {other}", IN_A_FOLDER) for other in ("--plot a.png", "--resume run.npz")),
        *((f"--resume . {other}", IN_A_FOLDER) for other in ("--compare", "--save run.npz")),
        ("--resume .", "--resume .: no run of `fastbn train --watch` there"),
        ("--replay run", IN_A_FOLDER),
        ("--optimizer sgd --norm none --lr 1e30", "--lr 1e+30 is too high"),
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
    assert re.fullmatch(r"fastbn(?: train)?: error: .*\n", err)
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
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    status, out, err = run([*blobs, "--save", tmp_path / "run.npz"], capsys)
    assert (status, out) == (2, "")
    assert err.endswith("run.npz: cannot be written: [Errno 28] No space left on device\n")


@pytest.fixture
def interrupted(monkeypatch):
    """Let Ctrl-C arrive in the second epoch."""
    train_epoch = Trainer.train_epoch

    def interrupted(self, title):
        if len(self.history) == 1:
            raise KeyboardInterrupt
        return train_epoch(self, title)

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_without_save(blobs, capsys):
    status, out, err = run(blobs, capsys)
    assert status == 130
    assert len(out.splitlines()) == 1
    assert (
        err == "\ninterrupted: nothing was saved; --save FILE keeps each epoch that is finished\n"
    )


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_tells_the_command_that_resumes(blobs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "a run.npz", tmp_path / "curves.png"
    status, _, err = run([*blobs, "--save", file, "--plot", plot], capsys)
    assert status == 130
    python, *words = shlex.split(err.splitlines()[-1])
    assert python == sys.executable
    assert words[:3] == ["-m", "fastbn", "train"]
    monkeypatch.undo()
    status, out, err = run(words[2:], capsys)
    assert (status, err) == (0, "")
    assert out.startswith("epoch 2/3")
    assert LAST_LINE.fullmatch(out.splitlines()[-1])
    assert is_png(plot)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_before_anything_is_built(blobs, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    file = tmp_path / "run.npz"
    assert run([*blobs, "--save", file], capsys)[0] == 130
    monkeypatch.setattr(np.random, "default_rng", interrupt)
    status, _, err = run([*blobs, "--save", tmp_path / "other.npz"], capsys)
    assert (status, "nothing was saved" in err) == (130, True)
    status, _, err = run(["train", "--resume", file, "--save", tmp_path / "other.npz"], capsys)
    assert (status, f"--resume {file}" in err) == (130, True)


def test_resume_equals_an_uninterrupted_run(blobs, tmp_path, capsys):
    whole, part, copy = (tmp_path / name for name in ("whole", "part", "copy"))
    expected = run([*blobs, "--save", whole], capsys)[1]
    run([*blobs, "--epochs", 1, "--save", part], capsys)
    first = part.read_bytes()
    status, out, _ = run(["train", "--resume", part, "--epochs", 3, "--save", copy], capsys)
    assert status == 0
    assert part.read_bytes() == first  # --save names another file
    assert out.splitlines() == expected.splitlines()[1:]
    assert copy.read_bytes() == whole.read_bytes()
    run(["train", "--resume", part, "--epochs", 3], capsys)
    assert part.read_bytes() == whole.read_bytes()


def test_resuming_a_finished_run_tells_its_accuracy(blobs, tmp_path, capsys):
    file = tmp_path / "run.npz"
    expected = run([*blobs, "--save", file], capsys)[1].splitlines()[-1]
    assert run(["train", "--resume", file], capsys) == (0, f"{expected}\n", "")


def test_a_resumed_run_keeps_its_options(blobs, tmp_path, capsys):
    file = tmp_path / "run.npz"
    run([*blobs, "--save", file], capsys)
    before = file.read_bytes()
    status, out, err = run(["train", "--resume", file, "--lr", "0.5"], capsys)
    assert (status, out) == (2, "")
    assert "--lr: cannot change on resuming: expected 0.003" in err
    assert file.read_bytes() == before
    assert run(["train", "--resume", file, "--lr", "0.003"], capsys)[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_a_real_ctrl_c(blobs, tmp_path):
    file = tmp_path / "run.npz"
    process = subprocess.Popen(
        **command(*blobs, "--epochs", 10**6, "--save", file),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for _ in range(2):
            assert process.stdout.readline().startswith("epoch ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith(f" -m fastbn train --resume {file}")
    assert "Traceback" not in err
    finished = 2 + len(out.splitlines())
    assert finished <= len(load_checkpoint(file, {}).history) <= finished + 1


@pytest.fixture
def folder(tmp_path):
    for module in ("filelock", "matplotlib"):
        pytest.importorskip(module)
    return tmp_path / "a run"


def lines_until(process, text):
    """Read what a process prints up to a line with that text."""
    lines = [process.stdout.readline()]
    while text not in lines[-1]:
        assert lines[-1], "".join(lines)
        lines.append(process.stdout.readline())
    return lines


def test_a_babysat_run(blobs, folder, capsys):
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    train = [*blobs, "--epochs", 10**4, "--watch", folder]
    with subprocess.Popen(**command(*train), **pipe) as process:
        lines_until(process, "epoch     3/10000  loss ")
        sent = "sent, for when the next epoch begins: lr 0.01, momentum 0.8\n"
        nudge = ["nudge", folder, "--lr", "0.01", "--momentum", "0.8"]
        assert run(nudge, capsys) == (0, sent, "")
        lines_until(process, ": lr 0.01, momentum 0.8; epoch ")
        lines_until(process, "epoch ")
        assert run(["nudge", folder, "--rollback", "2"], capsys)[0] == 0
        lines_until(process, ": rollback to 2; epoch 3 has the learning rate 0.00243\n")
        assert lines_until(process, "epoch ")[0].startswith("epoch     3/10000  loss ")
        status, out, err = run(["nudge", folder, "--rollback", "5000"], capsys)
        assert (status, out) == (2, "")
        assert re.fullmatch(
            r"fastbn nudge: error: --rollback: expected .* kept, 0, 1, 2, 3.*, got 5000\n", err
        )
        assert run(["nudge", folder, "--lr", "0.02"], capsys)[0] == 0
        lines_until(process, ": lr 0.02; epoch ")
        lines_until(process, "epoch ")
        process.kill()
    epochs = len(Log.read(folder, "test").standing)

    status, out, err = run(["nudge", folder, "--momentum", "0.7"], capsys)
    assert out == f"sent, for when fastbn train --resume '{folder}' goes on: momentum 0.7\n"
    with subprocess.Popen(**command("train", "--resume", folder), **pipe) as process:
        lines = lines_until(process, "epoch ")
        lines += lines_until(process, "loss ")
        assert lines[0] == (
            f"nudge before epoch {epochs + 1}: momentum 0.7; epoch {epochs + 1} has the learning"
            f" rate {0.02 * 0.9**epochs:g}\n"
        )
        assert lines[1].startswith(f"epoch {epochs + 1:5}/10000  loss ")
        assert run(["nudge", folder, "--stop"], capsys)[0] == 0
        out, _ = process.communicate()
    assert process.returncode == 0
    *_, curves, last = out.splitlines()
    assert curves == f"curves: {folder / 'curves.png'}"
    assert is_png(folder / "curves.png")

    replay = subprocess.run(
        **command("train", "--replay", folder), **pipe, check=True, stderr=subprocess.STDOUT
    )
    log = Log.read(folder, "test")
    assert [str(nudge) for _, nudge, _ in log.marks] == [
        "lr 0.01, momentum 0.8",
        "rollback to 2",
        "lr 0.02",
        "momentum 0.7",
        "stop",
    ]
    assert len(log.rows) > len(log.standing)
    assert replay.stdout.splitlines()[-2:] == [
        f"the same bits: {len(log.rows)} epochs, 5 nudges",
        last,
    ]
    assert LAST_LINE.fullmatch(last)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_in_a_folder(blobs, folder, capsys, monkeypatch):
    status, _, err = run([*blobs, "--watch", folder], capsys)
    assert status == 130
    assert "interrupted: the finished epochs are saved; resume with\n" in err
    words = shlex.split(err.splitlines()[-1])[1:]
    assert words == ["-m", "fastbn", "train", "--resume", str(folder)]
    monkeypatch.undo()
    status, out, err = run(words[2:], capsys)
    assert (status, err) == (0, "")
    assert [line[:9] for line in out.splitlines()[:2]] == ["epoch 2/3", "epoch 3/3"]
    assert run(words[2:], capsys) == (0, "\n".join([*out.splitlines()[2:], ""]), "")
    status, replayed, err = run(["train", "--replay", folder], capsys)
    assert (status, err) == (0, "")
    assert replayed.splitlines()[1:3] == out.splitlines()[:2]

    file = folder / "epoch-0002.npz"
    before = file.read_bytes()
    status, out, err = run(["train", "--resume", file], capsys)
    assert (status, out) == (2, "")
    assert f"--resume {file}: expected --save with another file, or the folder alone" in err
    assert file.read_bytes() == before
    copy = folder.with_name("copy.npz")
    assert run(["train", "--resume", file, "--save", copy], capsys)[0] == 0
    assert copy.read_bytes() == (folder / "epoch-0003.npz").read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_epoch", interrupt)
    assert run(["train", "--replay", folder], capsys) == (130, "", "\ninterrupted\n")
    monkeypatch.setattr(Trainer, "__init__", interrupt)
    status, _, err = run([*blobs, "--watch", folder.with_name("other")], capsys)
    assert (status, "nothing was saved" in err) == (130, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("run", "expected --lr, --momentum, --rollback or --stop, got none of them"),
        ("run --lr 0", "--lr: expected a positive number, got 0.0"),
        ("run --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("run --momentum 1", "--momentum: expected a number from 0 to below 1, got 1.0"),
        ("run --rollback -1", "--rollback: expected an epoch, or 0 for the start, got -1"),
        ("run --rollback last", "argument --rollback: invalid int value: 'last'"),
        ("run --stop", "run: no run of `fastbn train --watch` there"),
        ("--stop", "the following arguments are required: FOLDER"),
    ],
)
def test_nudges_that_are_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["nudge", *options.split()], capsys)
    assert (status, out, err) == (2, "", f"fastbn nudge: error: {message}\n")
    assert list(tmp_path.iterdir()) == []
