"""What docs/serving.md and the files for systemd and containers say of anybit-serve is so."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.deploy.service.conftest import Server

FOLDER = REPOSITORY / "deploy" / "service"
PAGE = REPOSITORY / "docs" / "serving.md"
UNIT = FOLDER / "anybit-serve@.service"


@pytest.fixture(scope="module")
def options(service: Path) -> set[str]:
    """Every option of the program."""
    done = subprocess.run([str(service), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.parametrize("path", [PAGE, UNIT, FOLDER / "Containerfile"], ids=lambda path: path.name)
def test_options_exist(options: set[str], path: Path) -> None:
    others = {"--wbits", "--abits", "--head-bits", "--kv", "--max-batch", "--out", "--now", "--help", "--yes", "--no-install-recommends", "--no-cache-dir", "--from", "--rm"}  # fmt: skip
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text(encoding="utf-8")))
    assert named & options and not named - others - options


def test_metrics_exist(serve: Callable[..., Server]) -> None:
    named = set(re.findall(r"`(anybit_[a-z_]+)`", PAGE.read_text(encoding="utf-8")))
    found = {name.split("{")[0] for name in serve().metrics()}
    histograms = {name.removesuffix("_count") for name in found if name.endswith("_count")}
    # One that no request has counted yet has no line.
    assert len(named) >= 5 and not named - found - histograms - {"anybit_requests_total"}


def test_outcomes_are_those_of_the_source() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.cpp"))
    (line,) = re.findall(r"by outcome: (.*)\.", PAGE.read_text(encoding="utf-8"))
    outcomes = re.findall(r"`(\w+)`", line)
    assert len(outcomes) == 9
    assert all(f'"{outcome}"' in source for outcome in outcomes)


def test_the_containers_files_are_there() -> None:
    text = (FOLDER / "Containerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(\S+) \S+$", text, re.MULTILINE)
    assert copied == ["pyproject.toml", "plugins", "deploy"]
    assert all((REPOSITORY / name).exists() for name in copied)
    for package, version in re.findall(r"([a-z-]+)==([\d.]+)", text):
        assert f"{package}=={version}" in (REPOSITORY / "constraints.txt").read_text(
            encoding="utf-8"
        )


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze")
    copy = tmp_path / UNIT.name  # with a program that exists here
    copy.write_text(
        UNIT.read_text(encoding="utf-8").replace("/opt/anybit/anybit-serve", "/bin/true")
    )
    done = subprocess.run(
        [program, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
