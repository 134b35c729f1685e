"""The cores and the memory that a process may use: the machine's, within its control groups. Whatever
they are, C++ and Python say the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

MB = 1_000_000
ALL = len(os.sched_getaffinity(0))
IN_PYTHON = """
import json, pathlib, sys
from plugins.cores import usable_cores, usable_memory
folders = [pathlib.Path(name) for name in json.load(sys.stdin)["machine"]]
print(json.dumps([usable_cores(*folders), usable_memory(*folders)]))
"""


@pytest.fixture
def ask(tmp_path: Path, compiled: Callable[..., Path]) -> Callable[..., tuple[int, int]]:
    """ask(control group, files, *command before) -> cores and bytes of a machine with 16 GB."""

    def run(group: str, files: dict[str, str], *before: str) -> tuple[int, int]:
        proc, control = tmp_path / "proc", tmp_path / "cgroup"
        texts = {proc / "self/cgroup": group, proc / "meminfo": "MemAvailable: 16000000 kB\n"}
        for path, text in {**texts, **{control / name: files[name] for name in files}}.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        task = json.dumps({"machine": [str(proc), str(control)]})

        def told(*command: str) -> Any:
            words = [*before, *command]
            return json.loads(
                subprocess.run(
                    words, input=task, capture_output=True, text=True, check=True, cwd=REPOSITORY
                ).stdout
            )

        cores, memory = told(str(compiled("driver")))
        assert told(sys.executable, "-c", IN_PYTHON) == [cores, memory]
        return cores, memory

    return run


def test_no_control_group(ask: Callable[..., tuple[int, int]]) -> None:
    assert ask("", {}) == (ALL, 16_000_000 << 10)
    assert ask("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"})[1] == 16_000_000 << 10


def test_affinity(ask: Callable[..., tuple[int, int]]) -> None:
    one = str(min(os.sched_getaffinity(0)))
    assert ask("", {}, "taskset", "-c", one)[0] == 1
    assert ask("0::/\n", {"cpu.max": "900000 100000\n"}, "taskset", "-c", one)[0] == 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        *(("max 100000", ALL), ("100000 100000", 1), ("100001 100000", min(ALL, 2))),
        *(("1000 100000", 1), ("0 100000", 1), ("50000 0", ALL), ("many", ALL), ("-5 1", ALL)),
    ],
)
def test_a_share_of_a_core_counts_as_a_whole_one(
    ask: Callable[..., tuple[int, int]], limit: str, expected: int
) -> None:
    assert ask("0::/a\n", {"a/cpu.max": f"{limit}\n"})[0] == expected


def test_every_group_above_counts(ask: Callable[..., tuple[int, int]]) -> None:
    """Version 2; cached files that nobody uses are given back at need."""
    files = {
        "a/b/cpu.max": "max 100000\n",
        "a/cpu.max": "50000 100000\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.current": f"{900 * MB}\n",
        "a/memory.max": f"{1000 * MB}\n",
        "a/memory.current": f"{950 * MB}\n",
        "a/memory.stat": f"anon 5\ninactive_file {700 * MB}\nactive_file 7\n",
    }
    assert ask("0::/a/b\n", files) == (1, 750 * MB)


def test_version_1(ask: Callable[..., tuple[int, int]]) -> None:
    files = {
        "cpu/a/cpu.cfs_quota_us": "50000\n",
        "cpu/a/cpu.cfs_period_us": "100000\n",
        "memory/b/memory.limit_in_bytes": f"{1000 * MB}\n",
        "memory/b/memory.usage_in_bytes": f"{950 * MB}\n",
        "memory/b/memory.stat": f"inactive_file 1\ntotal_inactive_file {700 * MB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": f"{999 * MB}\n",
    }
    assert ask("3:memory:/b\n2:cpu,cpuacct:/a\n1:cpuset:/b\n", files) == (1, 750 * MB)
    full = {"memory/b/memory.usage_in_bytes": f"{9999 * MB}\n"}
    assert ask("3:memory:/b\n", full)[1] == 0
