"""The IPluginV3 overrides, driven from C++ as TensorRT drives them, with kernels that print what
they are called with.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

PROBES = Path(__file__).parent / "trt"
PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plugin") / "probe"
    sources = [
        *PLUGINS.glob("core/tensorrt/*.cpp"),
        *PLUGINS.glob("core/tensorrt/abi/*.cpp"),
        *PLUGINS.glob("*/tensorrt.cpp"),
    ]
    include = [f"-I{PLUGINS}", f"-I{PLUGINS / 'core' / 'tensorrt' / 'abi'}"]
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-fsanitize=undefined",
            "-fno-sanitize-recover",
            *include,
            str(PROBES / "plugin.cpp"),
            *map(str, sources),
            "-o",
            str(output),
        ],
        check=True,
    )
    return output


@pytest.mark.parametrize("op", ["abq", "qqq", "minimum"])
def test_plugin_answers_as_recorded(program: Path, op: str) -> None:
    result = subprocess.run([str(program), op], capture_output=True, text=True, check=True)
    assert result.stdout == (PROBES / f"plugin_{op}.txt").read_text()
    assert result.stderr == (PROBES / f"plugin_{op}.errors.txt").read_text()
