"""Real TensorRTs without a GPU: the tables of functions that their bindings call are ours, our plugins
do in them what they should, and the backend says what is wrong with an engine or a machine.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugins.tools.build import build_library
from tests.deploy.engine_folder import add_engine
from tests.real_tensorrt import REAL, RealTensorrt, showing

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


@pytest.mark.parametrize("real", REAL)
def test_nvidias_bindings_call_the_functions_that_we_call(
    real: RealTensorrt, tmp_path: Path
) -> None:
    """Compiled with NVIDIA's headers, they show where each function stands."""
    recorder = tmp_path / "recorder.so"
    folders = ("deploy/runtime/src", "plugins", "plugins/core/tensorrt/abi")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += [f"-I{ROOT / folder}" for folder in folders]
    command += [f"-Wl,-soname,{real.library.name}", str(HERE / "recorder.cpp"), "-o", str(recorder)]
    subprocess.run(command, check=True)
    module = real.extension.stem
    words = [recorder, module, real.extension, *real.besides]
    done = subprocess.run(
        [sys.executable, HERE / "bindings.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(recorder))
    library.expected.restype = ctypes.c_char_p
    lines = library.expected(real.layout).decode().splitlines()
    ours = {name: [f"{table} {place}"] for name, table, place in map(str.split, lines)}
    assert json.loads(done.stdout) == ours
    assert len(ours) == 16


@pytest.mark.parametrize("real", showing("plugins cloned and read back"))
def test_plugins_are_made_cloned_and_read_back(
    real: RealTensorrt, compiled: Callable[..., Path]
) -> None:
    """Through the real registry: x may be fp32, fp16 or bf16 and not int8, and y [1, 2, 4] follows
    from x [1, 2, 3] and a scale [4, 5].
    """
    program = compiled("tensorrt/plugins")
    words = [program, real.library, build_library(), str(real.layout)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    one = "{} clone equal, read back equal, x 1 1 1 0, shapes 0 of 1 2 4"
    lines = [*[one.format("ABQGemm")] * 4, *[one.format("QQQGemm")] * 2]
    assert done.stdout.splitlines() == [*lines, "of another namespace: none"], done.stderr
    assert done.returncode == 0


@pytest.fixture
def with_engine(artifact: Path, tmp_path: Path) -> Callable[[RealTensorrt], Path]:
    """make(real) -> OUT with a file in an engine's place, and our plugin library."""

    def make(real: RealTensorrt) -> Path:
        out = Path(shutil.copytree(artifact, tmp_path / "out"))
        plugins = build_library().read_bytes()
        return add_engine(out, plugins=plugins, edition=real.edition, version=real.version)

    return make


@pytest.mark.parametrize("real", REAL)
def test_a_missing_driver(
    real: RealTensorrt,
    with_engine: Callable[[RealTensorrt], Path],
    driver: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend says so before TensorRT does; `auto` takes the ONNX file."""
    monkeypatch.setenv("ANYBIT_CUDA", "libcuda-that-is-nowhere.so.1")
    out = with_engine(real)
    load = {"tensorrt": str(real.library)}
    said = (
        'the CUDA driver: got "libcuda-that-is-nowhere.so.1: cannot open shared object file: No such '
        'file or directory", expected a library to open'
    )
    assert driver(out, [], {**load, "backend": "tensorrt"}, fails=True) == (
        f"{said}. Install NVIDIA's driver, or run the ONNX file (backend onnxruntime)."
    )
    card = driver(out, [], load)["card"]
    assert card["choice"] == said
    assert card["backend"].startswith("ONNX Runtime ")


@pytest.fixture
def refusal(
    with_engine: Callable[[RealTensorrt], Path],
    compiled: Callable[..., Path],
    driver: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[RealTensorrt], tuple[Path, str]]:
    """refusal(real) -> OUT with a file that is no engine, and what is said of it with a simulated
    driver.
    """

    def said(real: RealTensorrt) -> tuple[Path, str]:
        monkeypatch.setenv("ANYBIT_CUDA", str(compiled("tensorrt/simulation", shared=True)))
        out = with_engine(real)
        load = {"backend": "tensorrt", "tensorrt": str(real.library)}
        return out, driver(out, [], load, fails=True)

    return said


@pytest.mark.parametrize("real", showing("wrong engines refused"))
def test_a_refused_engine(real: RealTensorrt, refusal: Callable[..., tuple[Path, str]]) -> None:
    """TensorRT-RTX starts, loads the plugins and refuses the file."""
    out, message = refusal(real)
    assert message.startswith(f'{out}/engine/model.engine: got "')
    assert message.endswith(
        f'" from TensorRT-RTX {real.version}, expected an engine that it takes. Build the engine again '
        "on this machine."
    )


@pytest.mark.parametrize("real", showing("a missing driver told"))
def test_a_runtime_that_misses_the_driver(
    real: RealTensorrt, refusal: Callable[..., tuple[Path, str]]
) -> None:
    """The lean runtimes look for one themselves."""
    message = refusal(real)[1]
    assert message.startswith(
        f'TensorRT {real.version}: got "createInferRuntime: Error Code 6: API Usage Error (CUDA '
        "initialization failure with error: 35 "
    )
    assert message.endswith(
        "\", expected a runtime. Look whether nvidia-smi shows the GPU and a driver of this TensorRT's "
        "CUDA."
    )


@pytest.mark.parametrize("real", REAL)
def test_an_engine_of_another_version(
    real: RealTensorrt,
    artifact: Path,
    tmp_path: Path,
    compiled: Callable[..., Path],
    driver: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANYBIT_CUDA", str(compiled("tensorrt/simulation", shared=True)))
    out = Path(shutil.copytree(artifact, tmp_path / "out"))
    add_engine(out, edition=real.edition, version="10.0.0.1")
    load = {"backend": "tensorrt", "tensorrt": str(real.library)}
    title = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[real.edition]
    assert driver(out, [], load, fails=True) == (
        f"{title}: got version {real.version}, expected 10.0.0.1, which built the engine. Install that "
        "version, or build the engine again with this one."
    )
