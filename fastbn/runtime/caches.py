"""How large the caches are that one thread of this process can count on."""

import ctypes
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fastbn.runtime.limits import usable_cpus

KIB, MIB = 1 << 10, 1 << 20
VARIABLE = "FASTBN_CACHES"

# Virtual machines report the last-level cache of the whole host. No CPU so far has more than 16 MiB
# for each of its threads, and a share above 32 MiB was not seen to matter.
MOST_PER_CPU, MOST = 16 * MIB, 32 * MIB


class Caches(NamedTuple):
    """Sizes in bytes: level 1 (data) and level 2 of one core, and a share of the last level."""

    l1: int
    l2: int
    last: int

    def __str__(self) -> str:
        return ",".join(
            f"{size // MIB}M" if size % MIB == 0 else f"{size // KIB}K" for size in self
        )


class Cache(NamedTuple):
    """What the system says of one cache."""

    level: int
    size: int  # bytes
    cpus: int  # logical CPUs that share it


USUAL = Caches(32 * KIB, MIB, 16 * MIB)  # where the system tells nothing


def shares(found: Iterable[Cache], threads: int, cpus: int) -> Caches:
    """Return what a process that runs on `cpus` logical CPUs can count on.

    A core has `threads` of them. The first two levels are given a core; where several cores share
    a level 2, each has its part. The last level is shared by all who use it.
    """
    by_level = {cache.level: cache for cache in found if cache.size > 0}
    if not by_level:
        return USUAL

    def of_core(level: int, usual: int) -> int:
        cache = by_level.get(level)
        return cache.size // max(1, cache.cpus // threads) if cache else usual

    last = by_level[max(by_level)]
    share = last.size * min(1, cpus / max(1, last.cpus))
    return Caches(
        of_core(1, USUAL.l1), of_core(2, USUAL.l2), int(min(share, MOST_PER_CPU * cpus, MOST))
    )


def count_cpus(text: str) -> int:
    """Return how many CPUs a list such as "0-3,8" has."""
    return sum(
        int(end or begin) - int(begin) + 1 for begin, end in re.findall(r"(\d+)(?:-(\d+))?", text)
    )


def on_linux(cpus: int, root: Path = Path("/sys/devices/system/cpu")) -> Caches:
    """Read what the kernel tells in `root`."""
    cpu = root / f"cpu{min(os.sched_getaffinity(0))}"
    found = []
    for cache in cpu.glob("cache/index*"):
        level, kind, size, shared = (
            (cache / name).read_text(encoding="utf-8").strip()
            for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            found.append(Cache(int(level), int(size.rstrip("K")) * KIB, count_cpus(shared)))
    threads = count_cpus((cpu / "topology/thread_siblings_list").read_text(encoding="utf-8"))
    return shares(found, threads, cpus)


def on_macos(cpus: int, read: Callable[[str], int] | None = None) -> Caches:
    """Ask sysctl for the caches of the fast cores. Level 2 is the last, and cores share it."""
    if read is None:
        library = ctypes.CDLL(None)

        def read(name: str) -> int:
            value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
            failed = library.sysctlbyname(
                name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
            )
            return 0 if failed else value.value

    cores = read("hw.perflevel0.cpusperl2") or 1
    return shares(
        [
            Cache(1, read("hw.perflevel0.l1dcachesize") or read("hw.l1dcachesize"), 1),
            Cache(2, read("hw.perflevel0.l2cachesize") or read("hw.l2cachesize"), cores),
            Cache(3, read("hw.l3cachesize"), read("hw.logicalcpu") or cpus),
        ],
        1,
        cpus,
    )


def on_windows(cpus: int, answer: bytes | None = None) -> Caches:
    """Read an answer of GetLogicalProcessorInformationEx: all its records, one behind the other."""
    if answer is None:
        ask = ctypes.WinDLL("kernel32").GetLogicalProcessorInformationEx  # type: ignore[attr-defined]
        size = ctypes.c_uint32(0)
        ask(0xFFFF, None, ctypes.byref(size))  # how long the answer is
        buffer = ctypes.create_string_buffer(size.value)
        if not ask(0xFFFF, buffer, ctypes.byref(size)):
            return USUAL
        answer = buffer.raw
    found: dict[int, Cache] = {}
    threads, at = 1, 0
    while at < len(answer):
        kind, length = struct.unpack_from("<II", answer, at)
        if kind == 0:  # a core: flags, class, 20 reserved, groups, then masks of CPUs
            threads = max(threads, struct.unpack_from("<Q", answer, at + 32)[0].bit_count())
        elif kind == 2:  # a cache: level, ways, bytes in a line, size, type, 18 reserved, groups
            level, size, what = struct.unpack_from("<BxxxII", answer, at + 8)
            mask = struct.unpack_from("<Q", answer, at + 40)[0]
            if what != 1:  # instructions
                found.setdefault(level, Cache(level, size, max(1, mask.bit_count())))
        at += length
    return shares(found.values(), threads, cpus)


def find(cpus: int) -> Caches:
    """Return what FASTBN_CACHES says, or what the system says, or what is usual."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None:
        sizes = re.fullmatch(r"(\d{1,9})([KM]),(\d{1,9})([KM]),(\d{1,9})([KM])", wanted.strip())
        values = (
            [int(sizes[i]) * (KIB if sizes[i + 1] == "K" else MIB) for i in (1, 3, 5)]
            if sizes
            else [0]
        )
        if not all(values):
            raise ImportError(
                f"{VARIABLE}: expected level 1, level 2 and the share of the last level, such as "
                f"32K,1M,32M, got {wanted!r}"
            )
        return Caches(*values)
    systems: dict[str, Callable[[int], Caches]] = {
        "linux": on_linux, "darwin": on_macos, "win32": on_windows,
    }  # fmt: skip
    try:
        return systems[sys.platform](cpus)
    except (KeyError, OSError, ValueError, AttributeError, struct.error):
        return USUAL  # a system that tells nothing, or in another way, is no reason to fail


caches = find(usable_cpus())
