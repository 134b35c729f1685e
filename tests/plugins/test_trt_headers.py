"""Our declarations of TensorRT's plugin interfaces against recorded facts, and against NVIDIA's
headers where there are some.

Set ANYBIT_TENSORRT_INCLUDE to one or more folders (separated by ":") that hold an NvInferRuntime.h
of TensorRT 10 or 11.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from plugins.tools.toolkit import find_cuda_include

PROBES = Path(__file__).parent / "trt"
PLUGINS = Path(__file__).parents[2] / "plugins"
OURS = PLUGINS / "core" / "tensorrt" / "abi"
NVIDIA = [
    Path(folder)
    for folder in os.environ.get("ANYBIT_TENSORRT_INCLUDE", "").split(os.pathsep)
    if folder
]


def run_probe(
    source: str, include: Path, folder: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    """Compile a probe with the headers in `include`, and run it."""
    program = folder / "probe"
    includes = ["-isystem", str(include), "-isystem", str(find_cuda_include()), f"-I{PLUGINS}"]
    subprocess.run(
        ["g++", "-std=c++17", "-O1", *more, *includes, str(PROBES / source), "-o", str(program)],
        check=True,
    )
    return subprocess.run([str(program)], check=True, capture_output=True, text=True)


def major_version(include: Path) -> int:
    """Of the TensorRT that the headers belong to."""
    version = (include / "NvInferVersion.h").read_text()
    major = re.search(r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", version)
    assert major is not None
    return int(major.group(1))


def test_our_declarations_are_as_recorded(tmp_path: Path) -> None:
    assert run_probe("abi.cpp", OURS, tmp_path).stdout == (PROBES / "abi.txt").read_text()


@pytest.mark.skipif(not NVIDIA, reason="needs NVIDIA's headers: set ANYBIT_TENSORRT_INCLUDE")
@pytest.mark.parametrize("include", NVIDIA, ids=str)
def test_nvidias_declarations_are_as_recorded(include: Path, tmp_path: Path) -> None:
    assert run_probe("abi.cpp", include, tmp_path).stdout == (PROBES / "abi.txt").read_text()


@pytest.mark.skipif(not NVIDIA, reason="needs NVIDIA's headers: set ANYBIT_TENSORRT_INCLUDE")
@pytest.mark.parametrize("include", NVIDIA, ids=str)
@pytest.mark.parametrize(
    "source",
    [
        "core/tensorrt/plugin_base.cpp",
        "core/tensorrt/registry.cpp",
        "abq_gemm/tensorrt.cpp",
        "qqq_gemm/tensorrt.cpp",
    ],
)
def test_plugins_compile_with_nvidias_headers(include: Path, source: str) -> None:
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-isystem",
            str(include),
            "-isystem",
            str(find_cuda_include()),
            f"-I{PLUGINS}",
            str(PLUGINS / source),
        ],
        check=True,
    )


LOGGER_CASES = [(10, OURS), (11, OURS), *((0, include) for include in NVIDIA)]


@pytest.mark.parametrize(("layout", "include"), LOGGER_CASES, ids=str)
def test_logger_of_either_layout_is_found(layout: int, include: Path, tmp_path: Path) -> None:
    result = run_probe(
        "logger.cpp", include, tmp_path, f"-DLAYOUT={layout}", str(OURS / "logger.cpp")
    )
    known = {10: 1, 11: 2}[layout or major_version(include)]
    assert result.stdout == f"layout {known}\nseverity 1: through the logger\n"
    assert (
        result.stderr
        == "[anybit] no logger yet\n[anybit] from a stranger\n[anybit] without a finder\n"
    )
