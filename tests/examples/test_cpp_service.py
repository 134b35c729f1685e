"""examples/03_cpp_service: programs in C++, C and Rust, and the first two on the installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from deploy.runtime.build import build_runtime
from plugins.tools.build import build_onnxruntime

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "03_cpp_service"
PROMPT = "The river and the town"


@pytest.fixture(scope="module")
def out(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny W8A8 model with a cache of 64 tokens."""
    from calibration.progress import NullProgress
    from calibration.quant.bits import SchemeMap
    from calibration.quant.scheme import QuantScheme
    from exporter.pipeline import ExportRequest, run_pipeline

    made = tmp_path_factory.mktemp("example") / "out"
    request = ExportRequest(
        model=str(tiny_model_dir),
        schemes=SchemeMap(QuantScheme("ABQGemm", "rtn", 8, 8)),
        out=made,
        until="onnx",
        offline=True,
        max_seq=64,
        static_cache=True,
    )
    run_pipeline(request, NullProgress())
    return made


def environment() -> dict[str, str]:
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return {
        **os.environ,
        "ANYBIT_ONNXRUNTIME": str(library),
        "ANYBIT_KERNELS": str(build_onnxruntime()),
    }


def run(program: Path, *arguments: Any, code: int = 0) -> tuple[str, str]:
    found = subprocess.run(
        [program, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stderr
    return found.stdout, found.stderr


def check(stream: Path, stream_from_c: Path, out: Path) -> None:
    """Both programs give the same text, however many run at once."""
    text, said = run(stream_from_c, out, PROMPT)
    assert text
    assert said == "\n32 tokens\n"
    shown, said = run(stream, out, PROMPT, "Once", PROMPT)
    pieces: dict[str, str] = {"1": "", "2": "", "3": ""}
    for line in shown.split("\n"):
        number, colon, piece = line.partition(": ")
        if colon and number in pieces:
            pieces[number] += piece
    assert pieces["1"] == pieces["3"] != pieces["2"]
    assert text.replace("\n", "").startswith(pieces["1"][:10])
    assert "1: 32 tokens, length" in said
    _, said = run(stream, out / "no", PROMPT, code=2)
    assert said.startswith(f"{out}/no: got no such folder, expected an artifact folder.")
    run(stream, code=2)
    run(stream_from_c, code=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The programs in C++ and in C."""
    library, folder = build_runtime(), tmp_path_factory.mktemp("programs")
    include = REPOSITORY / "deploy" / "runtime" / "include"
    links = [str(library), f"-Wl,-rpath,{library.parent}"]
    made = folder / "stream", folder / "stream_from_c"
    for compiler, source, program in zip(
        (["g++", "-std=c++17", "-pthread"], ["gcc", "-std=c99"]),
        ("main.cpp", "main.c"),
        made,
        strict=True,
    ):
        command = [*compiler, "-Wall", "-Wextra", "-Werror", f"-I{include}"]
        subprocess.run([*command, EXAMPLE / source, *links, "-o", program], check=True)
    return made


def test_with_g_plus_plus(out: Path, built: tuple[Path, Path]) -> None:
    check(*built, out)


def test_from_rust(out: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    """Its declarations, which no header checks, are those of the C program."""
    rustc = shutil.which("rustc")
    if rustc is None:
        pytest.skip("rustc is not on PATH (apt install rustc)")
    folder, program = build_runtime().parent, tmp_path / "stream_from_rust"
    links = ["-L", f"native={folder}", "-C", f"link-arg=-Wl,-rpath,{folder}"]
    command = [rustc, "--edition=2021", "-Dwarnings", *links, EXAMPLE / "main.rs", "-o", program]
    subprocess.run(command, check=True)
    assert run(program, out, PROMPT) == run(built[1], out, PROMPT)
    assert run(program, out / "no", PROMPT, code=2) == run(built[1], out / "no", PROMPT, code=2)
    assert run(program, code=2)[1] == "usage: stream_from_rust OUT PROMPT\n"


@pytest.mark.slow
def test_as_an_installed_package(out: Path, tmp_path: Path) -> None:
    """Configured, built and installed with CMake, then found by the example's own project; without
    optimization and all sources as one, which is a tenth of the time and no part of the package.
    """
    pytest.importorskip("cmake", reason="CMake is not installed (pip install cmake ninja)")
    if not shutil.which("cmake"):
        pytest.skip("cmake is not on PATH")

    def cmake(*arguments: Any) -> None:
        command = ["cmake", *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr

    python = f"-DPython3_EXECUTABLE={sys.executable}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    package, prefix, example = tmp_path / "package", tmp_path / "prefix", tmp_path / "example"
    kernels = f"-DANYBIT_KERNELS={build_onnxruntime()}"
    one = ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"]
    quickly = [*generator, "-DCMAKE_BUILD_TYPE=None", *one]
    cmake("-S", REPOSITORY / "deploy" / "runtime", "-B", package, *quickly, kernels, python)
    cmake("--build", package)
    cmake("--install", package, "--prefix", prefix)
    shutil.copytree(EXAMPLE, tmp_path / "elsewhere")
    found = f"-DCMAKE_PREFIX_PATH={prefix}"
    cmake("-S", tmp_path / "elsewhere", "-B", example, *generator, found)
    cmake("--build", example)
    check(example / "stream", example / "stream_from_c", out)
    installed = {path.name for path in prefix.rglob("*") if path.is_file()}
    assert {"libanybit.a", "libanybit_onnxruntime.so", "anybit.hpp", "anybit.h"} <= installed
