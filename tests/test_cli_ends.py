"""Commands in surroundings that fail: streams, disks, folders, links, signals at any moment.

Every end is a clean one: a result, or one line and status 2, or silence where nobody reads. Files
are whole, and the next command goes on to the bits of a training that nothing happened to.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import write_blobs
from test_cli import command, is_png, run

import fastbn
from fastbn.demo.checkpoint import load_checkpoint
from fastbn.demo.log import Log

for module in ("filelock", "matplotlib", "safetensors", "tqdm", "threadpoolctl"):
    pytest.importorskip(module)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these are the ends of POSIX")


@pytest.fixture
def train(tmp_path):
    """Return a short training."""
    return ["train", "--data", write_blobs(tmp_path), "--hidden", "4", "--epochs", "2"]


@contextmanager
def closed_pipe():
    """Give a file to write to of which nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as file:
        yield file


def finish(argv, **options):
    """Run a command in a process of its own; return status, output and errors."""
    environment = {**os.environ, **options.pop("env", {})}
    process = command(*argv)
    process["env"] = {**process["env"], **environment, "PYTHONPATH": process["env"]["PYTHONPATH"]}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run(**process, **streams, text=True, check=False, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [(["info"], "1"), (["bench"], ""), (["--help"], ""), ("train", ""), ("watch", "1")],
)
def test_a_pipe_that_nobody_reads(argv, unbuffered, train, tmp_path):
    words = {"train": train, "watch": ["watch", tmp_path / "run", *train[1:]]}
    argv = argv if isinstance(argv, list) else words[argv]
    with closed_pipe() as pipe:
        status, _, err = finish(argv, stdout=pipe, env={"PYTHONUNBUFFERED": unbuffered})
    assert (status, err) == (141, "")
    if argv[0] == "watch":  # what was trained is there
        assert len(Log.read(tmp_path / "run").standing) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full(unbuffered, train):
    environment = {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        status, _, err = finish(train, stdout=full, env=environment)
        words = "error: [Errno 28] No space left on device: 'standard output'\n"
        assert (status, err) == (2, f"fastbn train: {words}")
        # Where the errors cannot be told either, the status tells.
        assert finish(["info", "--fast"], stderr=full, env=environment)[0] == 2


def test_closed_streams(train, tmp_path):
    path = tmp_path / "saved"
    closed = "import os, sys; [*map(os.close, map(int, sys.argv[1]))]; "
    closed += "os.execv(sys.argv[2], sys.argv[2:])"
    for numbers in ("2", "12", "012"):
        process = command(*train, "--save", path)
        process["args"] = [sys.executable, "-c", closed, numbers, *process["args"]]
        done = subprocess.run(**process, stdout=subprocess.PIPE, check=False)
        assert done.returncode == 0
        assert (b"test accuracy" in done.stdout) == (numbers == "2")
        assert len(load_checkpoint(path, {}).history) == 2
        path.unlink()
    process["args"][-2:] = ["--model", "cnn"]
    process["args"][3] = "2"
    done = subprocess.run(**process, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (2, b"")  # an error is not told as a result


def test_a_working_directory_that_was_deleted(train, tmp_path):
    gone = tmp_path / "gone"
    code = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])"

    def there(*argv):
        gone.mkdir()
        process = command(*argv)
        process["args"] = [sys.executable, "-c", code, *process["args"]]
        process["env"]["MPLCONFIGDIR"] = str(tmp_path)
        done = subprocess.run(**process, cwd=gone, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    status, out, err = there(*train, "--plot", tmp_path / "c.png")
    assert (status, err) == (0, "")
    assert "test accuracy" in out
    expected = "[Errno 2] No such file or directory\n"
    assert there(*train, "--save", "run")[2] == (
        f"fastbn train: error: --save run: cannot be written: {expected}"
    )
    assert there("watch", "run", *train[1:])[2].endswith(f"run: cannot be written: {expected}")


def test_links_in_a_circle(train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("loop.png").symlink_to("loop.png")
    for options in (["--save", "loop"], ["--plot", "loop.png"], ["--save", "loop/x"]):
        status, out, err = run([*train, *options], capsys)
        assert (status, out) == (2, "")
        assert f"{' '.join(options)}: cannot be written: [Errno 40] Too many levels" in err
    commands = "resume loop:watch loop:replay loop:nudge loop --stop:train --config loop"
    for argv in map(str.split, f"{commands}:train --data loop/x.npz".split(":")):
        status, out, err = run(argv, capsys)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "loop" in err
    with pytest.raises(OSError, match="Too many levels"):
        fastbn.save("loop", {"bn": fastbn.BatchNorm(3)})
    with pytest.raises(OSError, match="loop"):
        fastbn.load("loop", {"bn": fastbn.BatchNorm(3)})


def test_an_encoding_that_cannot_say_a_name(train, tmp_path):
    data, plot = (tmp_path / f"ü漢\udcff$\\frac$.{kind}" for kind in ("npz", "png"))
    try:
        Path(train[2]).rename(data)
    except OSError:
        pytest.skip("not every file system takes such names")
    words = ["train", "--data", data, *train[3:], "--plot", plot]
    status, out, err = finish(words, env={"PYTHONIOENCODING": "ascii"})
    assert (status, err) == (0, "")
    assert f"curves: {tmp_path}/\\xfc\\u6f22\\udcff$\\frac$.png\n" in out
    assert is_png(plot)


def test_a_name_with_a_line_break(tmp_path, capsys):
    status, _, err = run(["train", "--data", f"{tmp_path}/a\nb\x1b.npz"], capsys)
    text = f"fastbn train: error: --data {tmp_path}/a\\nb\\x1b.npz: no such file\n"
    assert (status, err) == (2, text)
    assert run(["info", "a\nb"], capsys)[2].endswith("unrecognized arguments: a\\nb\n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MPLBACKEND", "nosuch", "matplotlib cannot be imported: Key backend: 'nosuch' is not"),
        ("MATPLOTLIBRC", "text.usetex: true", "matplotlib cannot draw: "),
    ],
)
def test_a_configuration_that_cannot_draw(name, value, message, train, tmp_path):
    if name == "MATPLOTLIBRC":
        if shutil.which("latex"):
            pytest.skip("LaTeX is installed")
        (tmp_path / "matplotlibrc").write_text(value)
        value = str(tmp_path)
    for argv in ([*train, "--plot", tmp_path / "c.png"], ["watch", tmp_path / "run", *train[1:]]):
        status, out, err = finish(argv, env={name: value})
        assert (status, out) == (2, "")
        assert f"fastbn {argv[0]}: error: {message}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--save a.png --plot ./a.png", "--save: expected another file than that of --plot"),
        ("--save w.safetensors --export w.safetensors", "--export: .* than that of --save"),
        ("--save link", "--save: expected another file than that of --data, got link"),
        ("--config c.json --save c.json", "--save: expected another file than that of --config"),
        ("resume saved.png --plot saved.png --save x", "--plot: .* than that of FILE"),
        ("resume saved.png --plot saved.png", "--save: .* than that of --plot"),
    ],
)
def test_a_file_has_one_use(options, message, train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("blobs.npz")
    Path("c.json").write_text("{}")
    assert run([*train, "--save", "saved.png"], capsys)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = options.split()
    status, out, err = run(words if words[0] == "resume" else [*train, *words], capsys)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"fastbn \\w+: error: {message}.*\n", err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(["resume", "saved.png", "--save", "./saved.png"], capsys)[0] == 0


def test_a_picture_that_fails_after_the_training_costs_nothing_else(
    train, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastbn.cli.results.draw", full)
    plot, weights = tmp_path / "c.png", tmp_path / "w.safetensors"
    status, out, err = run([*train, "--plot", plot, "--export", weights], capsys)
    assert status == 2
    assert weights.exists()
    assert "test accuracy" in out.splitlines()[-1]
    text = f"--plot {plot}: cannot be written: [Errno 28] No space left on device"
    assert err == f"fastbn train: error: {text}\n"


def test_results_are_written_before_they_are_told(train, tmp_path):
    weights = tmp_path / "w.safetensors"
    # Two epochs are read, and no line more.
    with subprocess.Popen(
        **command(*train, "--export", weights), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        for _ in range(2):
            assert process.stdout.readline().startswith(b"epoch ")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 141)
    assert weights.exists()


def test_memory_that_does_not_suffice(train, capsys, monkeypatch):
    def fail(*_):
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr("fastbn.demo.train.Trainer.train_epoch", fail)
    expected = "fastbn train: error: the memory does not suffice: Unable to allocate 5 TiB\n"
    assert run(train, capsys) == (2, "", expected)
    for hidden in ("999999999999", "9" * 400, "99999999,99999999"):
        status, out, err = run([*train, "--hidden", hidden], capsys)
        assert (status, out) == (2, "")
        assert "--hidden: expected a network that fits into the memory, " in err


LOADING = """
import signal, sys
moment, seen = int(sys.argv[1]), 0

def hook(event, args):
    global seen
    seen += event == "import"
    if event == "import" and seen == moment:
        signal.raise_signal(signal.SIGINT)

from fastbn.cli import main
sys.argv = ["fastbn", *sys.argv[2:]]
sys.addaudithook(hook)
sys.exit(main())
"""


@pytest.mark.parametrize("moment", [1, 40, 200])
def test_ctrl_c_while_modules_are_loaded(moment, train, tmp_path):
    process = command()
    words = [*train, "--plot", str(tmp_path / "c.png")]
    process["args"] = [sys.executable, "-c", LOADING, str(moment), *words]
    done = subprocess.run(**process, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert re.fullmatch(r"\ninterrupted(: nothing was saved; .*)?\n", done.stderr)


# Faults at moments. A moment is a file that is opened to be written, renamed or deleted below a
# folder; the hook of Python's own audits sees each.
FAULTY = """
import errno, os, resource, signal, sys
kind, moment, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
seen = 0

def hook(event, args):
    global seen
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    if not str(args[0]).startswith(folder) or (event == "open" and not args[2] & WRITES):
        return
    seen += 1
    if kind == "read-only" and seen > moment:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), args[0])
    if seen - 1 != moment:
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "full":  # no file grows beyond this, and what is written is cut there
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
    if kind == "closed":
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

from fastbn.cli import main
sys.argv = ["fastbn", *sys.argv[4:]]
sys.addaudithook(hook)
status = main()
if kind == "count":
    print(seen, file=sys.stderr)
sys.exit(status)
"""
STATUS = {"full": 2, "closed": 141, "read-only": 2, "kill": -signal.SIGKILL}
QUICK = ["--data", "{data}", "--hidden", "4", "--epochs"]
FILES = ["--export", "{0}/w.safetensors", "--plot", "{0}/c.png"]
SAVE = ["--save", "{0}/f.safetensors"]
# What comes before, what the fault meets, and what goes on after it: where something was begun, and
# where nothing was.
RESUME = ["resume", "{0}/f.safetensors", "--epochs", "2", *FILES]
RESUME_RUN = ["resume", "{0}/run", "--epochs", "2"]
WATCH, REPLAY = ["watch", "{0}/run", *QUICK], ["replay", "{0}/run"]
NUDGE = ["nudge", "{0}/run", "--rollback", "1"]
CASES = {
    "train": (None, ["train", *QUICK, "2", *SAVE, *FILES], RESUME),
    "watch": (None, [*WATCH, "2"], RESUME_RUN),
    "resume a file": (["train", *QUICK, "1", *SAVE], RESUME, RESUME),
    "resume a folder": ([*WATCH, "1"], RESUME_RUN, RESUME_RUN),
    "replay": ([*WATCH, "2"], REPLAY, REPLAY),
    "nudge": ([*WATCH, "2"], NUDGE, NUDGE),
}


def faulty(kind, moment, folder, argv):
    process = command()
    process["args"] = [sys.executable, "-c", FAULTY, kind, str(moment), str(folder), *argv]
    process["env"] |= {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(**process, capture_output=True, text=True, check=False, timeout=100)


def check_whole(folder):
    """Check every file that a user would look at."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".safetensors":
            assert load_file(path)
        if path.suffix == ".png":
            assert is_png(path)
        if path.suffix in (".jsonl", ".csv"):
            assert path.read_text().endswith("\n")
            assert path.suffix == ".csv" or all(map(json.loads, path.read_text().splitlines()))


def results_in(folder):
    names = ("f.safetensors", "w.safetensors", "run/epoch-0002.safetensors", "run/curves.csv")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


class Case:
    """A command to be disturbed, and what it comes to otherwise."""

    def __init__(self, name, tmp_path, capsys):
        self.tmp_path, self.capsys, self.data = tmp_path, capsys, write_blobs(tmp_path)
        before, self.words, self.next_words = CASES[name]
        self.before = tmp_path / "before"
        self.before.mkdir()
        if before:
            assert self.run(before, self.before)[0] == 0
        if name == "nudge":  # of a run that is not at its end
            log = self.before / "run" / "log.jsonl"
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
        self.undisturbed = self.fresh("undisturbed")
        done = self.disturbed("count", -1, self.undisturbed)
        assert done.returncode == 0
        self.moments = int(done.stderr)
        self.expected = results_in(self.undisturbed)

    def fresh(self, name):
        return Path(shutil.copytree(self.before, self.tmp_path / name))

    def argv(self, words, folder):
        return [word.format(folder, data=self.data) for word in words]

    def run(self, words, folder):
        return run(self.argv(words, folder), self.capsys)

    def disturbed(self, kind, moment, folder):
        return faulty(kind, moment, folder, self.argv(self.words, folder))

    def check(self, done, status, folder):
        """Check the end of a disturbed command, the files, and that the next one goes on."""
        assert done.returncode in (0, status)
        if done.returncode == 2:
            assert re.fullmatch(r"fastbn \w+: error: [^\n]+\n", done.stderr)
        elif done.returncode >= 0:
            assert done.stderr == ""
        check_whole(folder)
        begun = (folder / "f.safetensors").exists() or (folder / "run" / "log.jsonl").exists()
        assert self.run(self.next_words if begun else self.words, folder)[0] == 0
        assert results_in(folder) == self.expected
        check_whole(folder)
        if (folder / "run").exists() and self.next_words != NUDGE:
            assert self.run(REPLAY, folder)[0] == 0


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("train", 1),
        ("watch", 1),
        *(pytest.param(name, 10, marks=pytest.mark.long) for name in CASES),
    ],
)
def test_a_fault_at_any_moment(name, number, tmp_path, capsys):
    case = Case(name, tmp_path, capsys)
    for fault, status in STATUS.items():
        statuses = set()
        for part in range(number):
            folder = case.fresh(f"{fault} {part}")
            moment = (2 * part + 1) * case.moments // (2 * number)
            done = case.disturbed(fault, moment, folder)
            statuses.add(done.returncode)
            if fault in ("full", "closed"):
                assert not [*folder.rglob(".*.tmp")]
            case.check(done, status, folder)
        assert status in statuses


@pytest.mark.long
@pytest.mark.parametrize("name", ["train", "watch", "replay"])
def test_a_real_disk_that_fills_up(name, tmp_path, capsys):
    case = Case(name, tmp_path, capsys)
    disk = tmp_path / "disk"
    disk.mkdir()
    statuses = []
    for size in range(8, 168, 16):  # KB
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system")
        try:
            try:
                shutil.copytree(case.before, disk, dirs_exist_ok=True)
            except shutil.Error:  # what comes before does not fit
                continue
            done = case.disturbed("none", -1, disk)
            statuses.append(done.returncode)
            if done.returncode:
                assert "No space left on device" in done.stderr
            mount = ["mount", "-o", "remount,size=10m", disk]
            subprocess.run(mount, check=True)
            case.check(done, 2, disk)
        finally:
            subprocess.run(["umount", disk], check=True)
    assert {0, 2} == {*statuses}
