"""The console script: one name for every command line, whatever lies in the working directory."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from deploy.anybit import main
from tests.tracked import REPOSITORY, tracked_files

COMMANDS = (
    "export",
    "calibrate",
    "plugins",
    "attribute",
    "bench",
    "compare",
    "diff",
    "doctor",
    "eval",
    "generate",
    "inspect",
    "lm-eval",
    "pack",
    "polygraphy",
    "prove",
    "serve",
    "triton",
    "trtexec",
    "unpack",
)
SCRIPT = "import sys; sys.path.remove(''); from deploy.anybit import main; sys.exit(main())"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a console script does: without the working directory on Python's path."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with packages of our names that cannot be imported."""
    for name in ("deploy", "exporter", "calibration", "plugins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')\n")
    return tmp_path


def test_help_lists_every_command(hostile: Path) -> None:
    done = run(hostile, "--help")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")][
        : len(COMMANDS)
    ] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_reached_from_anywhere(hostile: Path, command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(hostile, command, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    # Of a processor, not of a clock: 0.2 s on a quiet machine; torch alone would take more than this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = f"anybit-trt {metadata.version('anybit-trt')}\n"
    for arguments in (["--version"], ["export", "--version"], ["calibrate", "--version"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0 and capsys.readouterr().out == wanted


def test_errors_keep_their_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["exprot"])
    assert left.value.code == 2 and "invalid choice: 'exprot'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheel_holds_what_runs_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # setuptools writes beside what it builds
    for path in tracked_files():
        copy = source / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for needed in (
        "calibration/default_text.txt",
        "calibration/out/layout.py",
        "plugins/build_flags.json",
        "plugins/core/exports.map",
        "plugins/core/device/ptx.cuh",
        "plugins/core/tensorrt/abi/NvInferRuntime.h",
        "plugins/abq_gemm/cuda/int8.cu",
        "plugins/qqq_gemm/README.md",
    ):
        assert needed in names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "docs"))}
