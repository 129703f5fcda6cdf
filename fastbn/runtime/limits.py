"""What the system grants this process: its affinity, and the quotas of its control groups."""

import os
from collections.abc import Callable
from math import ceil
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def of_control_groups(
    controller: str, read: Callable[[Path], float | None], root: Path, membership: Path
) -> float | None:
    """Return the least that `read` finds in the control groups of this process, or None."""
    try:
        lines = os.fsdecode(membership.read_bytes()).splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "none", ""][:3]
        if controllers == "":  # version 2
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        here = base / path.lstrip("/")
        # Limits of the groups around it hold as well. In a container the path may be the host's.
        for group in (here, *here.parents):
            if group.is_relative_to(base):
                try:
                    found.append(read(group))
                except (OSError, ValueError, ZeroDivisionError):  # ValueError: also "max"
                    continue
    return min((limit for limit in found if limit is not None), default=None)


def _cpus(group: Path) -> float | None:
    if (group / "cpu.max").exists():  # version 2: "150000 100000" or "max 100000"
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
    else:  # version 1: -1 is no limit
        quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
        period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
    return int(quota) / int(period) if int(quota) >= 0 else None


def _memory(group: Path) -> int:
    version_2 = group / "memory.max"
    return int(
        (version_2 if version_2.exists() else group / "memory.limit_in_bytes").read_text(
            encoding="utf-8"
        )
    )


def usable_cpus(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return on how many CPUs this process may run: its affinity, and its control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = of_control_groups("cpu", _cpus, root, membership)
    return max(1, min(cpus, ceil(quota or cpus)))


def usable_memory(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return how many bytes this process may use: of the machine, or of its control group.

    A system that does not tell is taken to have 8 GiB.
    """
    try:
        of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        of_machine = 8 << 30
    limit = of_control_groups("memory", _memory, root, membership)
    return int(min(of_machine, limit or of_machine))
