"""The plugin library, its CPU simulation and the self-test: what they are built from, and how."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plugins.errors import InputError
from plugins.tools.recipe import Command, Recipe, make, make_file, run
from plugins.tools.toolkit import CudaToolkit, find_cuda, find_cuda_include, find_program

__all__ = [
    "AARCH64_LIBRARY",
    "AARCH64_SELFTEST",
    "EMULATED_LIBRARY",
    "ONNXRUNTIME_LIBRARY",
    "PLUGIN_LIBRARY",
    "SELFTEST",
    "SIM_LIBRARY",
    "build_aarch64",
    "build_emulated",
    "build_folders",
    "build_library",
    "build_onnxruntime",
    "build_selftest",
    "build_sim",
    "build_soname",
    "build_source",
]

PLUGIN_LIBRARY = "libanybit_plugins.so"
ONNXRUNTIME_LIBRARY = "libanybit_onnxruntime.so"
SIM_LIBRARY = "libanybit_kernels_sim.so"
EMULATED_LIBRARY = "libanybit_kernels_emulated.so"
SELFTEST = "anybit-selftest"
AARCH64_LIBRARY = "libanybit_onnxruntime_aarch64.so"
AARCH64_SELFTEST = "anybit-selftest-aarch64"

# An op's folder is found by these; plugins/CMakeLists.txt has the same patterns.
KERNEL_SOURCES = ("*/cuda/*.cu", "core/host/*.cu")
PLUGIN_SOURCES = ("*/tensorrt.cpp", "core/tensorrt/*.cpp", "core/tensorrt/abi/*.cpp")
ONNXRUNTIME_SOURCES = ("*/onnxruntime.cpp", "core/onnxruntime/*.cpp", "*/cpu/*.cpp")
TABLE_OF_OPS = "core/host/ops.cu"  # C++ like the simulation's
# Of sources named *_avx2.cpp and so on, by machine.
INSTRUCTION_SETS = {"x86_64": ("avx2", "avx512"), "aarch64": ("neon",)}
# The GEMMs with AMX, and the kernels to which they leave few tokens.
EMULATED_SOURCES = ("core/cpu/*.cpp", "*_gemm/cpu/op.cpp", "*_gemm/cpu/*_avx512.cpp")
SELFTEST_SOURCES = ("selftest/*.cpp", "*/selftest.cpp")

_SOURCES = Path(__file__).resolve().parent.parent


def build_folders() -> list[Path]:
    """Where libraries may be: build/ of a checkout, then the user's cache folder, which serves where
    the first belongs to somebody else.
    """
    root = _SOURCES.parent
    folders = [root / "build"] if (root / "pyproject.toml").is_file() else []
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # an account without a home
            return folders
    return [*folders, cache / "anybit-trt"]


def _flags() -> dict[str, list[str]]:
    flags: dict[str, list[str]] = json.loads(
        (_SOURCES / "build_flags.json").read_text(encoding="utf-8")
    )
    return flags


def _architectures(choice: str, default: Sequence[str]) -> list[str]:
    names = list(default) if choice == "all" else choice.split(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise InputError(
            "--arch",
            f"got {choice!r}, expected all, or compute capabilities such as 80;90",
            "Give the capabilities without dots, separated by semicolons",
        )
    return names


def _gencode(names: Sequence[str]) -> Command:
    """Machine code for each architecture, with all instructions of 9.0, and PTX of the last for
    GPUs that come later.

    Code for 90a runs on 9.0 and nowhere else, so it loses nothing as machine code; PTX is of the
    general form, which later GPUs take.
    """
    code = dict.fromkeys("90a" if name == "90" else name for name in names)
    general = names[-1].rstrip("af")
    targets = [(name, f"sm_{name}") for name in code] + [(general, f"compute_{general}")]
    return [f"-gencode=arch=compute_{name},code={target}" for name, target in targets]


def _sources(*patterns: str) -> list[str]:
    return sorted(
        str(path.relative_to(_SOURCES)) for pattern in patterns for path in _SOURCES.glob(pattern)
    )


def _recipe(
    output: str,
    compiles: dict[str, Command],
    link: Command,
    record: dict[str, Any] | None = None,
    takes: str = Recipe.takes,
) -> Recipe:
    return Recipe(
        root=_SOURCES,
        name=output,
        folders=build_folders(),
        compiles=compiles,
        link=link,
        include=_flags()["include"],
        more=["core/exports.map"],
        record=record or {},
        takes=takes,
    )


def _include(folders: Sequence[str]) -> Command:
    return [f"-I{folder}" for folder in folders]


def _nvcc(cuda: CudaToolkit, architectures: Sequence[str]) -> Command:
    flags = _flags()
    folders = _include([*flags["include"], str(cuda.include)])
    return [str(cuda.nvcc), *flags["nvcc"], *_gencode(architectures), *folders]


def _host(cuda: CudaToolkit) -> Command:
    flags = _flags()
    folders = [*_include(flags["include"]), "-isystem", str(cuda.include)]
    return [find_program("g++", "g++"), *flags["cxx"], *folders]


def _sim() -> Command:
    folders = ["-I.", "-isystem", str(find_cuda_include())]
    return [find_program("g++", "g++"), *_flags()["sim"], *folders, "-x", "c++"]


def _link_sim() -> Command:
    return [find_program("g++", "g++"), "-shared", "-Wl,--no-undefined", "{}"]


def _link_cuda(cuda: CudaToolkit, *flags: str) -> Command:
    libraries = [f"-L{cuda.lib}", *_flags()["libraries"]]
    return [find_program("g++", "g++"), "-shared", *flags, "{}", *libraries]


def build_library(arch: str = "all", say: Callable[[str], None] | None = None) -> Path:
    """The TensorRT plugin library, compiled if needed.

    It links the CUDA runtime statically, so it loads where there is no driver and no CUDA toolkit.

    Args:
        arch: "all", or compute capabilities such as "80;90".
        say: told before and after it is compiled; None prints on stderr.

    Raises:
        InputError: no compiler, or a wrong `arch`.
        UserError: the compiler failed; the message holds its output.
    """
    flags, cuda = _flags(), find_cuda()
    architectures = _architectures(arch, flags["architectures"])
    compiles = dict.fromkeys(_sources(*KERNEL_SOURCES), _nvcc(cuda, architectures))
    compiles |= dict.fromkeys(_sources(*PLUGIN_SOURCES), _host(cuda))
    record = {
        "architectures": architectures,
        "nvcc": str(cuda.nvcc),
        "nvcc_version": cuda.version(),
    }
    link = _link_cuda(cuda, *flags["link"])
    return make(_recipe(PLUGIN_LIBRARY, compiles, link, record, "a minute or two"), say)


def build_sim() -> Path:
    """The same kernels compiled with g++, run by plugins/core/sim/simt.h on host memory; needs no
    CUDA compiler.

    Raises:
        InputError: no g++, or no CUDA headers.
        UserError: the compiler failed; the message holds its output.
    """
    compiler = _sim()
    version = subprocess.run(
        [compiler[0], "--version"], capture_output=True, text=True, check=False
    ).stdout.partition("\n")[0]
    compiles = dict.fromkeys(_sources(*KERNEL_SOURCES), compiler)
    return make(_recipe(SIM_LIBRARY, compiles, _link_sim(), {"compiler": version}))


def _onnxruntime(source: str, machine: str, compiler: str = "g++") -> Command:
    flags, sets = _flags(), INSTRUCTION_SETS.get(machine, ())
    special = [flag for name in sets if source.endswith(f"_{name}.cpp") for flag in flags[name]]
    return [compiler, *flags["onnxruntime"], *special, "-I."]


def build_onnxruntime(say: Callable[[str], None] | None = None) -> Path:
    """The ONNX Runtime custom-op library with the CPU kernels, compiled if needed; needs g++ only.

    It holds the kernels for every instruction set and chooses when it is loaded, so that it may be
    copied to another machine of the same architecture. A library of the same sources serves where
    there is no compiler, so the recipe names g++ wherever it lies.

    Args:
        say: told before and after it is compiled; None prints on stderr.

    Raises:
        InputError: it has to be compiled, and there is no g++.
        UserError: the compiler failed; the message holds its output.
    """
    machine = platform.machine()
    compiles = {source: _onnxruntime(source, machine) for source in _sources(*ONNXRUNTIME_SOURCES)}
    compiles[TABLE_OF_OPS] = [*_onnxruntime(TABLE_OF_OPS, machine), "-x", "c++"]
    link = ["g++", "-shared", *_flags()["link"], "{}"]
    return make(_recipe(ONNXRUNTIME_LIBRARY, compiles, link), say)


def build_emulated() -> Path:
    """The CPU kernels for AMX, with C++ in place of its instructions, for machines without it that
    have AVX-512; needs g++ only. For tests.

    Raises:
        InputError: no g++.
        UserError: the compiler failed; the message holds its output.
    """
    sources = [*_sources(*EMULATED_SOURCES), TABLE_OF_OPS]
    more = ["-DANYBIT_EMULATED_TILES", "-O1", "-x", "c++"]  # a third of the time of -O3
    machine = platform.machine()
    compiles = {source: [*_onnxruntime(source, machine), *more] for source in sources}
    link = ["g++", "-shared", *_flags()["link"], "{}"]
    return make(_recipe(EMULATED_LIBRARY, compiles, link))


def build_aarch64(compiler: str = "aarch64-linux-gnu-g++") -> tuple[Path, Path]:
    """The ONNX Runtime custom-op library and the self-test for AArch64, with a cross compiler and less
    optimization: an emulator runs them, and not for long. For tests.

    Raises:
        InputError: no such compiler.
        UserError: the compiler failed; the message holds its output.
    """
    compiler = find_program(compiler, compiler)
    sources = [*_sources(*ONNXRUNTIME_SOURCES), TABLE_OF_OPS]
    more = ["-O1", "-x", "c++"]
    compiles = {source: [*_onnxruntime(source, "aarch64", compiler), *more] for source in sources}
    link = [compiler, "-shared", *_flags()["link"], "{}"]
    library = make(_recipe(AARCH64_LIBRARY, compiles, link))
    command = [compiler, *_flags()["selftest"], "-I."]
    compiles = dict.fromkeys(_sources(*SELFTEST_SOURCES), command)
    program = make(_recipe(AARCH64_SELFTEST, compiles, [compiler, "{}", "-ldl"]))
    return library, program


def build_selftest() -> Path:
    """The program anybit-selftest, which loads either library; needs g++ only.

    Raises:
        InputError: no g++.
        UserError: the compiler failed; the message holds its output.
    """
    cxx = find_program("g++", "g++")
    compiler = [cxx, *_flags()["selftest"], "-I."]
    compiles = dict.fromkeys(_sources(*SELFTEST_SOURCES), compiler)
    return make(_recipe(SELFTEST, compiles, [cxx, "{}", "-ldl"]))


def build_source(source: Path, arch: str | None = None) -> Path:
    """A library of one .cu file outside this package that uses the package's headers; compiled if
    needed.

    Args:
        source: compiled with the flags of the plugin library.
        arch: compute capabilities such as "80;90a", for nvcc; None for the simulation, with g++.

    Raises:
        InputError: no compiler, or a wrong `arch`.
        UserError: the compiler failed; the message holds its output.
    """
    if arch is None:
        output, compiler, link = f"{source.stem}-sim.so", _sim(), _link_sim()
    else:
        cuda = find_cuda()
        output = f"{source.stem}-{arch.replace(';', '-')}.so"
        compiler, link = _nvcc(cuda, _architectures(arch, [])), _link_cuda(cuda)
    return make(_recipe(output, {str(source.resolve()): compiler}, link))


def build_soname(library: Path, soname: str) -> Path:
    """A tiny library that carries `soname` and pulls in `library`.

    Once loaded, a later dlopen(soname) anywhere in the process finds it, and through it every
    symbol of `library`: no environment variable, no file in a system folder.

    Raises:
        InputError: no g++, or no folder that can be written.
        UserError: the linker failed; the message holds its output.
    """
    name = f"soname-{hashlib.sha256(str(library).encode()).hexdigest()[:12]}"

    def work(scratch: Path, output: Path) -> None:
        made, cxx = scratch / soname, find_program("g++", "g++")
        flags = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-Wl,--no-as-needed"]
        place = [f"-Wl,-rpath,{library.parent}", "-o", str(made)]
        run([cxx, *flags, str(library), *place], soname, scratch)
        made.replace(output)

    return make_file(soname, [folder / name for folder in build_folders()], Path.is_file, work)
