"""Hosted CI and the commit hooks call what the Makefile and the virtual environment have."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.real_tensorrt import SEEN

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    text = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text)["jobs"])


def test_make_targets_exist(jobs: dict[str, Any]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {words[1] for line in run if (words := shlex.split(line))[0] == "make"}
    assert {"check", "test"} <= called <= targets
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony and set(phony.group(1).split()) == targets


def test_one_goal_has_two_jobs_and_several_follow_each_other(tmp_path: Path) -> None:
    """Side by side "clean test" would delete what is being installed."""
    more = f"include {REPOSITORY / 'Makefile'}\none two:\n\t@echo '$(MAKEFLAGS)'\n"
    (tmp_path / "Makefile").write_text(more, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}

    def flags(*goals: str) -> list[str]:
        command = ["make", "--directory", str(tmp_path), "--no-print-directory", *goals]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    (one,) = flags("one")
    assert re.search(r"-j2\b|--jobs=2", one)
    assert not any(re.search(r"-j|--jobs", each) for each in flags("one", "two"))


def test_the_oldest_python_is_tested(jobs: dict[str, Any]) -> None:
    versions = jobs["cpu"]["strategy"]["matrix"]["python"]
    assert versions == sorted(versions, key=lambda text: int(text.split(".")[1]))
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("item", range(1, 10))
def test_the_gpu_lane_finds_the_commands_of_each_item(
    jobs: dict[str, Any], tmp_path: Path, item: int
) -> None:
    """The step writes exactly what stands between one number of the page and the next."""
    page = (REPOSITORY / "benchmarks" / "TODO-gpu.md").read_text(encoding="utf-8")
    own = re.search(rf"^{item}\. .*?(?=^\d+\. |\Z)", page, re.MULTILINE | re.DOTALL)
    assert own
    wanted = "".join(re.findall(r"^ *```sh\n(.*?)^ *```", own.group(), re.MULTILINE | re.DOTALL))
    script = next(step["run"] for step in jobs["gpu"]["steps"] if "env" in step)
    write, condition = script.partition("test -s")[0], script.splitlines()[-2]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "TODO-gpu.md").write_text(page, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-euc", write + condition],
        cwd=tmp_path,
        env={**os.environ, "ITEMS": str(item)},
        check=False,
    )
    assert (tmp_path / "commands.sh").read_text(encoding="utf-8") == wanted
    assert (done.returncode == 0) == bool(wanted)


def test_the_tensorrt_lane_has_the_versions_that_were_seen(
    jobs: dict[str, Any], tmp_path: Path
) -> None:
    """Its step writes the commands of CONTRIBUTING.md."""
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "CONTRIBUTING.md").write_text(page, encoding="utf-8")
    script = jobs["tensorrt"]["steps"][-1]["run"]
    words = ["bash", "-euc", script[: script.index("PATH=")]]
    subprocess.run(words, cwd=tmp_path, check=True)
    commands = (tmp_path / "commands.sh").read_text(encoding="utf-8")
    (versions,) = re.findall(r"^for version in (.+); do$", commands, re.MULTILINE)
    assert versions.split() == list(SEEN["tensorrt"])
    (folders,) = re.findall(r"^export ANYBIT_TENSORRT_LEAN=(.+)$", commands, re.MULTILINE)
    assert folders.split(":") == [f"$PWD/lean/{version}" for version in versions.split()]


def test_hooks_run_tools_of_the_virtual_environment() -> None:
    text = (REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [repository] = yaml.safe_load(text)["repos"]
    assert repository["repo"] == "local"
    pinned = {
        re.split(r"[=><]", one)[0] for one in PROJECT["project"]["optional-dependencies"]["dev"]
    }
    for hook in repository["hooks"]:
        folder, tool = hook["entry"].split()[0].rsplit("/", 1)
        assert (hook["language"], folder) == ("system", ".venv/bin") and tool in pinned, hook
