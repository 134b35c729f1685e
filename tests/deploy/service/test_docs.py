"""What docs/serving.md and the files for systemd and containers say of anybit-serve is so."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.service.build import SERVICE
from tests.conftest import REPOSITORY
from tests.deploy.service.conftest import Server

FOLDER = REPOSITORY / "deploy" / "service"
PAGE = REPOSITORY / "docs" / "serving.md"
UNIT = FOLDER / "anybit-serve@.service"
CONTAINER = FOLDER / "Containerfile"


@pytest.fixture(scope="module")
def options(service: Path) -> set[str]:
    """Every option of the program."""
    done = subprocess.run([str(service), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.parametrize("path", [PAGE, UNIT, CONTAINER], ids=lambda path: path.name)
def test_options_exist(options: set[str], path: Path) -> None:
    others = {"--engine", "--wbits", "--abits", "--head-bits", "--kv", "--max-batch", "--out", "--now", "--help", "--yes", "--no-install-recommends", "--no-cache-dir", "--from", "--rm", "--build-arg", "--variant", "--include", "--stop-timeout"}  # fmt: skip
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text(encoding="utf-8")))
    assert named & options and not named - others - options


def test_metrics_exist(serve: Callable[..., Server]) -> None:
    page, metrics = PAGE.read_text(encoding="utf-8"), serve().metrics()
    named = set(re.findall(r"\banybit_[a-z_]+", page))
    names = {name.split("{")[0] for name in metrics}
    histograms = {name.removesuffix("_count") for name in names if name.endswith("_count")}
    assert len(named) >= 10 and not named - names - histograms
    (line,) = re.findall(r"counts by outcome: (.*)\.", page)
    listed = re.findall(r'requests_total\{endpoint="chat",outcome="(\w+)"', " ".join(metrics))
    assert len(listed) == 9 and set(re.findall(r"`(\w+)`", line)) == set(listed)


def test_the_containers_packages_are_those_of_the_tests() -> None:
    found = re.findall(r"([a-z-]+)==([\d.]+)", CONTAINER.read_text(encoding="utf-8"))
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len(found) == 2 and all(f"{name}=={version}" in constraints for name, version in found)


COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -o) shift; echo > "$1" ;;
    *.cpp|*.o) test -e "$1" || exit 9 ;;
    --version) echo g++ ;;
  esac
  shift
done
"""


def test_the_containers_steps(tmp_path: Path) -> None:
    """From what it copies, with no other Python packages than it installs, they make what it ships:
    everything but the compiler's own work, which takes minutes.
    """
    text = CONTAINER.read_text(encoding="utf-8").replace("\\\n", "")
    source, venv, app = (tmp_path / name for name in ("source", "venv", "app"))
    source.mkdir()
    for name, target in re.findall(r"^COPY (?!--from)(\S+) (\S+)$", text, re.MULTILINE):
        kept = shutil.ignore_patterns("__pycache__")
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / target, ignore=kept)
        else:
            shutil.copy(REPOSITORY / name, source / target)
    packages = venv / "lib/python3/site-packages"
    packages.mkdir(parents=True)
    for name in ("onnxruntime", "pgm_build_deps"):
        spec = importlib.util.find_spec(name)
        assert spec and spec.submodule_search_locations
        (packages / name).symlink_to(spec.submodule_search_locations[0])
    programs = venv / "bin"
    programs.mkdir()
    for program, script in (
        (programs / "g++", COMPILER),
        (programs / "python", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'),
    ):
        program.write_text(script)
        program.chmod(0o755)
    steps = re.findall(r"^RUN (.*)$", text[text.index("COPY") :], re.MULTILINE)
    assert len(steps) == 2
    for step in steps:
        command = step.replace("/venv/", f"{venv}/").replace("/app", str(app))
        done = subprocess.run(
            ["sh", "-ec", command],
            cwd=source,
            env={"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    libraries = {path.name.split(".so")[0] for path in app.glob("*.so*")}
    assert libraries == {"libanybit", "libanybit_onnxruntime", "libonnxruntime"}
    assert f'ENTRYPOINT ["/app/{SERVICE}"]' in text and (app / SERVICE).is_file()
    assert re.findall(r"^COPY --from=build (\S+) (\S+)$", text, re.MULTILINE) == [("/app", "/app")]


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
