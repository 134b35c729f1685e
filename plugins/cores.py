"""How many processor cores and how much memory this process may use: those of the machine, and what a
container allows.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath

__all__ = ["allowed_memory", "free_memory", "usable_cores", "usable_memory"]


def usable_cores(proc: Path = Path("/proc"), control: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that the process may run on, at most as many as its control groups give it time for, and
    at least one.

    A share of a core counts as a whole one. ONNX Runtime by itself takes every core of the machine.

    Args:
        proc, control: where the kernel shows processes and control groups, of either version.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _groups("cpu", proc, control)]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def free_memory(proc: Path = Path("/proc")) -> int | None:
    """Bytes of the machine's memory that programs may still take; None where the system does not tell
    (it is not Linux).

    Args:
        proc: as of usable_cores.
    """
    try:
        text = (proc / "meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def usable_memory(proc: Path = Path("/proc"), control: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the process may still take: of the machine's free memory as much as its control groups
    allow; None where the system does not tell.

    Args:
        proc, control: as of usable_cores.
    """
    known = [
        room for room in (free_memory(proc), allowed_memory(proc, control)) if room is not None
    ]
    return min(known, default=None)


def allowed_memory(
    proc: Path = Path("/proc"), control: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that the process's control groups allow beyond what they have; None without a limit.

    Args:
        proc, control: as of usable_cores.
    """
    rooms = [_room(folder) for folder in _groups("memory", proc, control)]
    return min((room for room in rooms if room is not None), default=None)


def _groups(controller: str, proc: Path, control: Path) -> list[Path]:
    """The folders of the process's control group of a controller and of those above it; a limit of
    any counts.
    """
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):  # version 2 names none
            continue
        root = control / controller if names else control
        own = PurePosixPath(path.lstrip("/"))
        found += [root / folder for folder in (own, *own.parents)]
    return found


def _quota(folder: Path) -> float | None:
    """Cores' worth of time of a control group; None without a limit."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        return int(limit) / int(period) if int(limit) >= 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # such as max
        return None


def _room(folder: Path) -> int | None:
    """Bytes that a control group allows beyond what it has; None without a limit. Cached files count
    for what it has only as long as nobody needs the memory.
    """
    first = ("memory.max", "memory.current", "inactive_file")
    second = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    *names, cached = first if (folder / first[0]).exists() else second
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
    except (OSError, ValueError):  # such as max
        return None
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        files = int(dict(line.split() for line in lines).get(cached, "0"))
    except (OSError, ValueError):
        files = 0
    return max(limit - max(used - files, 0), 0)
