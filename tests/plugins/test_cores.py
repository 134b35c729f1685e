"""The cores and the memory that a process may use: its affinity, and the limits of its control
groups.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plugins.cores import allowed_memory, free_memory, usable_cores, usable_memory

EIGHT = set(range(8))


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: EIGHT)


def cores(folder: Path, group: str, files: dict[str, str]) -> int:
    machine(folder, group, files)
    return usable_cores(folder / "proc", folder / "cgroup")


def machine(folder: Path, group: str, files: dict[str, str]) -> None:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("?", 8)],
)
def test_quota_of_version_2(tmp_path: Path, limit: str, expected: int) -> None:
    assert cores(tmp_path, "0::/a/b\n", {"a/b/cpu.max": f"{limit}\n"}) == expected


def test_the_least_quota_of_all_groups_above_counts(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}
    assert cores(tmp_path, "0::/a/b\n", files) == 3


def test_quota_of_version_1(tmp_path: Path) -> None:
    files = {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}
    group = "3:cpuset:/x\n2:cpu,cpuacct:/a\n"
    assert cores(tmp_path / "some", group, files) == 3
    files["cpu/a/cpu.cfs_quota_us"] = "-1\n"
    assert cores(tmp_path / "none", group, files) == 8


def test_affinity_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(tmp_path, tmp_path) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores(tmp_path, tmp_path) == 1


def test_memory_of_version_2(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "max\n", "a/b/memory.current": "50\n", "a/b/memory.stat": ""}
    machine(tmp_path / "none", "0::/a/b\n", files)
    assert allowed_memory(tmp_path / "none/proc", tmp_path / "none/cgroup") is None
    files |= {
        "a/memory.max": "1000\n",
        "a/memory.current": "700\n",
        "a/memory.stat": "anon 500\ninactive_file 150\n",
    }
    machine(tmp_path / "some", "0::/a/b\n", files)
    assert allowed_memory(tmp_path / "some/proc", tmp_path / "some/cgroup") == 450


def test_memory_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": "1000\n",
        "memory/a/memory.usage_in_bytes": "1100\n",
        "memory/a/memory.stat": "cache 20\n",
    }
    machine(tmp_path, "3:memory:/a\n2:cpu:/b\n", files)
    assert allowed_memory(tmp_path / "proc", tmp_path / "cgroup") == 0


@pytest.mark.parametrize(
    ("free", "room", "expected"), [(24, None, 24), (24, 16, 16), (8, 16, 8), (None, 16, 16)]
)
def test_what_may_be_used_is_the_least_of_both(
    tmp_path: Path, free: int | None, room: int | None, expected: int
) -> None:
    limit = "max" if room is None else room * 1024
    files = {"a/memory.max": f"{limit}\n", "a/memory.current": "0\n", "a/memory.stat": ""}
    machine(tmp_path, "0::/a\n", files)
    if free is not None:
        (tmp_path / "proc/meminfo").write_text(f"MemAvailable:   {free} kB\n")
    assert usable_memory(tmp_path / "proc", tmp_path / "cgroup") == expected * 1024


def test_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   24 kB\n")
    assert free_memory(tmp_path) == 24 * 1024
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    assert free_memory(tmp_path) is None
