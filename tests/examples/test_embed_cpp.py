"""The C++ example compiles against the official headers, where a TensorRT SDK is at hand."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "02_embed_cpp" / "main.cpp"


def test_it_compiles_without_a_warning() -> None:
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("no TensorRT SDK: TENSORRT_ROOT is not set")
    from plugins.tools.build import find_cuda_include

    done = subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-isystem",
            f"{root}/include",
            "-isystem",
            str(find_cuda_include()),
            str(SOURCE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
