"""What the system says of its caches, and what follows for tiles."""

import struct
from pathlib import Path

import pytest
from support import python

import fastbn
from fastbn.runtime import caches
from fastbn.runtime.caches import KIB, MIB, USUAL, Caches

ZEN4 = [("1 Data", "32K", "0"), ("1 Instruction", "32K", "0"), ("2 Unified", "1024K", "0"),
        ("3 Unified", "32768K", "0-15")]  # fmt: skip
SPR = [("1 Data", "48K", "0-1"), ("2 Unified", "2048K", "0-1"), ("3 Unified", "491520K", "0-1")]


def system(tmp_path, listed, siblings="0"):
    """Write what Linux says of its first CPU."""
    for cpu in range(64):
        base = tmp_path / f"cpu{cpu}"
        for i, (level, size, shared) in enumerate(listed):
            index = base / "cache" / f"index{i}"
            index.mkdir(parents=True)
            number, kind = level.split()
            for name, text in [
                ("level", number), ("type", kind), ("size", size), ("shared_cpu_list", shared),
            ]:  # fmt: skip
                (index / name).write_text(text + "\n", encoding="utf-8")
        (base / "topology").mkdir(parents=True)
        (base / "topology/thread_siblings_list").write_text(siblings + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.skipif("linux" not in fastbn.runtime_info()["platform"], reason="reads Linux's files")
@pytest.mark.parametrize(
    ("listed", "siblings", "cpus", "expected"),
    [
        (ZEN4, "0", 16, Caches(32 * KIB, MIB, 32 * MIB)),
        (ZEN4, "0", 2, Caches(32 * KIB, MIB, 4 * MIB)),  # others use the rest
        (SPR, "0-1", 2, Caches(48 * KIB, 2 * MIB, 32 * MIB)),  # a host's cache
        (SPR, "0", 2, Caches(24 * KIB, MIB, 32 * MIB)),  # two cores share it
        ([("2 Unified", "512K", "0")], "0", 1, Caches(USUAL.l1, 512 * KIB, 512 * KIB)),
        ([], "0", 4, USUAL),
    ],
)
def test_caches_on_linux(tmp_path, listed, siblings, cpus, expected):
    assert caches.on_linux(cpus, system(tmp_path, listed, siblings)) == expected


def test_caches_on_macos():
    told = {
        "hw.perflevel0.l1dcachesize": 128 * KIB, "hw.perflevel0.l2cachesize": 16 * MIB,
        "hw.perflevel0.cpusperl2": 4,
    }  # fmt: skip
    found = caches.on_macos(8, lambda name: told.get(name, 0))
    assert found == Caches(128 * KIB, 4 * MIB, 16 * MIB)


def test_caches_on_windows():
    def cache(level, size, kind, mask):
        body = struct.pack("<BBHII18xHQ8x", level, 8, 64, size, kind, 1, mask)
        return struct.pack("<II", 2, 8 + len(body)) + body

    def core(mask):
        body = struct.pack("<BB20xHQ8x", 1, 0, 1, mask)
        return struct.pack("<II", 0, 8 + len(body)) + body

    answer = b"".join([
        core(0b0011), core(0b1100), cache(1, 48 * KIB, 2, 0b0011), cache(1, 32 * KIB, 1, 0b0011),
        cache(2, 2 * MIB, 0, 0b0011), cache(3, 24 * MIB, 0, 0b1111),
    ])  # fmt: skip
    assert caches.on_windows(4, answer) == Caches(48 * KIB, 2 * MIB, 24 * MIB)
    assert caches.on_windows(2, answer) == Caches(48 * KIB, 2 * MIB, 12 * MIB)


@pytest.mark.parametrize(
    ("text", "count"), [("0", 1), ("0-3", 4), ("0-1,8-9", 4), ("0,2,4\n", 3), ("", 0)]
)
def test_lists_of_cpus(text, count):
    assert caches.count_cpus(text) == count


def test_a_system_that_tells_nothing_has_usual_caches(monkeypatch):
    monkeypatch.delenv(caches.VARIABLE, raising=False)
    monkeypatch.setattr("sys.platform", "plan9")
    assert caches.find(4) == USUAL
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {10**6}, raising=False)
    assert caches.find(4) == USUAL


SHOW = "import fastbn; print(fastbn.runtime_info()['caches'])"


def test_fastbn_caches_says_what_they_are():
    assert python(SHOW, FASTBN_CACHES="48K,2M,24M").stdout.strip() == "48K,2M,24M"
    assert python(SHOW, FASTBN_CACHES=None).stdout.strip() == fastbn.runtime_info()["caches"]


@pytest.mark.parametrize(
    "value", ["", "1M", "32K,1M", "32K,1M,0M", "32,1M,8M", "a,b,c", "-1K,1M,1M"]
)
def test_a_bad_fastbn_caches_is_an_import_error(value):
    result = python("import fastbn", FASTBN_CACHES=value)
    assert (
        "ImportError: FASTBN_CACHES: expected level 1, level 2 and the share of the last level, "
        f"such as 32K,1M,32M, got {value!r}"
    ) in result.stderr


@pytest.mark.parametrize("sizes", ["1K,1K,1K", "32K,1M,1M", "64K,64M,512M"])
def test_no_bit_depends_on_the_caches(sizes):
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        + """
import golden, json
wanted, groups = json.loads(golden.FILE.read_text(encoding="utf-8")), golden.groups()
some = [name for name in groups if "float32" in name]
print([name for name in some if golden.hashes(groups[name]) != wanted[name]])
print(len(some))
"""
    )
    wrong, count = python(code, FASTBN_CACHES=sizes).stdout.splitlines()
    assert wrong == "[]"
    assert int(count) > 0
