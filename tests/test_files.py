"""Files are written whole or not at all, and are nobody else's business meanwhile."""

import errno
import os
import re
import stat
import sys
from pathlib import Path

import pytest
from support import python

from fastbn.files import check_writable, write_atomically

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")


def write(path, content=b"new"):
    write_atomically(path, lambda file: file.write(content))


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_the_permissions_of_the_old_file_stay(mode, tmp_path):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    path.chmod(mode)

    def fill(file):
        seen.append(mode_of(Path(file.name)))  # before anything can be read in it
        file.write(b"new")

    write_atomically(path, fill)
    assert seen == [mode]
    assert mode_of(path) == mode
    assert path.read_bytes() == b"new"


@posix
def test_a_group_that_cannot_be_kept_gets_nothing(tmp_path, monkeypatch):
    path, asked = tmp_path / "file", []
    path.write_bytes(b"old")
    path.chmod(0o664)

    def refused(file, owner, group):
        asked.append((owner, group))
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    write(path)
    old = path.stat()
    assert asked == [(old.st_uid, old.st_gid), (-1, old.st_gid)]
    assert mode_of(path) == 0o604


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_what_the_umask_grants(umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "file") == 0o666 & ~umask


def test_the_temporary_name_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(20):
        write_atomically(tmp_path / "file", lambda file: names.add(Path(file.name).name))
    assert len(names) == 20
    assert all(re.fullmatch(r"\.file\.[0-9a-f]{16}\.tmp", name) for name in names)


@posix
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_bytes(b"mine")
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))  # the attacker is lucky
    (tmp_path / f".file.{'00' * 8}.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "file"))):
        write(tmp_path / "file")
    assert (tmp_path / "precious").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), ValueError("odd"), SystemExit()]
)
@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_nothing_is_left_behind_whatever_fails(when, failure, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        if when != "write":
            patch.setattr(os, when, fail)
        with pytest.raises(type(failure)) as caught:
            write_atomically(path, fail if when == "write" else lambda file: file.write(b"new"))
    if isinstance(failure, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@posix
def test_the_file_and_its_folder_reach_the_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def record(descriptor):
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write(tmp_path / "file")
    assert synced == [False, True]


@posix
@pytest.mark.parametrize("function", [check_writable, write])
def test_links_in_a_circle_are_an_os_error_that_names_the_file(function, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "a"))) as caught:
        function(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


@posix
def test_a_link_to_nothing_yet_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_the_longest_name_that_a_file_may_have(tmp_path):
    write(tmp_path / ("x" * 255))
    assert [len(each.name) for each in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize("function", [check_writable, write])
@pytest.mark.parametrize("name", ["none/file", "a file/file", "x" * 300])
def test_a_refusal_names_the_file_that_was_asked_for(name, function, tmp_path):
    (tmp_path / "a file").write_bytes(b"")
    path = tmp_path / name
    with pytest.raises(OSError, match=re.escape(name)) as caught:
        function(path)
    assert caught.value.filename == str(path)
    assert ".tmp" not in str(caught.value)


def test_an_error_about_another_file_names_that_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "file", lambda _: (tmp_path / "other").read_bytes())
    assert caught.value.filename == str(tmp_path / "other")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are text")
def test_a_name_that_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe")
    write(path)
    check_writable(path)
    assert path.read_bytes() == b"new"
    with pytest.raises(OSError, match="No such file") as caught:
        write(path.with_name(os.fsdecode(b"\xff")) / "file")
    repr(caught.value)


@posix
def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, signal; from pathlib import Path; from fastbn.files import write_atomically\n"
        "def fill(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_atomically(Path({str(path)!r}), fill)"
    )
    assert python(code).returncode < 0
    assert path.read_bytes() == b"old"
