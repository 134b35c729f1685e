"""Compiles the plugin library and its CPU simulation; does nothing when sources, flags and
compilers are unchanged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plugins.errors import InputError, UserError
from plugins.tools.toolkit import find_cuda, find_cuda_include, find_program

__all__ = [
    "PLUGIN_LIBRARY",
    "SELFTEST",
    "SIM_LIBRARY",
    "build_folder",
    "build_library",
    "build_selftest",
    "build_sim",
    "build_soname",
    "build_source",
]

PLUGIN_LIBRARY = "libanybit_plugins.so"
SIM_LIBRARY = "libanybit_kernels_sim.so"
SELFTEST = "anybit-selftest"

# An op's folder is found by these; plugins/CMakeLists.txt has the same patterns.
KERNEL_SOURCES = ("*/cuda/*.cu", "core/host/*.cu")
PLUGIN_SOURCES = ("*/tensorrt.cpp", "core/tensorrt/*.cpp", "core/tensorrt/abi/*.cpp")
SELFTEST_SOURCES = ("selftest/*.cpp", "*/selftest.cpp")

_SOURCES = Path(__file__).resolve().parent.parent
_COMPILER_OUTPUT_LINES = 40

Command = list[str]


def build_folder() -> Path:
    """Where libraries are kept: build/ of a checkout, else the user's cache folder."""
    root = _SOURCES.parent
    if (root / "pyproject.toml").is_file():
        return root / "build"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybit-trt"


def _flags() -> dict[str, list[str]]:
    flags: dict[str, list[str]] = json.loads(
        (_SOURCES / "build_flags.json").read_text(encoding="utf-8")
    )
    return flags


def _included(sources: Iterable[str]) -> list[Path]:
    """The source files and every file of ours that they include, directly or not; conditions are
    not looked at.
    """
    found: set[Path] = set()
    waiting = [_SOURCES / source for source in sources]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for quote, name in re.findall(
            r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]',
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            folders = [path.parent] * (quote == '"') + [
                _SOURCES / folder for folder in _flags()["include"]
            ]
            waiting += [file.resolve() for folder in folders if (file := folder / name).is_file()]
    return sorted(found)


def _digest(sources: Iterable[str], *parts: Any) -> str:
    """Hash of `parts` and of what is compiled: the sources, what they include, and the linker's
    list of exports.
    """
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for path in [*_included(sources), _SOURCES / "core" / "exports.map"]:
        digest.update(f"\0{os.path.relpath(path, _SOURCES)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


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


def _run(command: Command, what: str) -> None:
    result = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        output = "\n".join(
            (result.stdout + result.stderr).strip().splitlines()[:_COMPILER_OUTPUT_LINES]
        )
        raise UserError(
            what,
            f"got exit code {result.returncode} from {command[0]}, expected 0:\n{output}\n",
            f"The command was: {' '.join(command)}",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time; a second process waits and then finds the result."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile_and_link(compiles: dict[str, Command], link: Command, output: Path) -> None:
    """Run the compiler commands in parallel, then the linker, and move the library to its place in
    one step.

    Args:
        compiles: compiler command by source file; "-c source -o object" is appended.
        link: linker command; "objects -o library" goes in place of "{}".
        output: final path of the library.
    """
    launcher = [ccache] if (ccache := shutil.which("ccache")) else []
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as scratch:
        objects = {
            source: str(Path(scratch) / (source.replace("/", "-") + ".o")) for source in compiles
        }
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            jobs = [
                pool.submit(
                    _run, [*launcher, *command, "-c", source, "-o", objects[source]], source
                )
                for source, command in compiles.items()
            ]
            for job in jobs:
                job.result()
        library = Path(scratch) / output.name
        position = link.index("{}")
        _run(
            [*link[:position], *objects.values(), "-o", str(library), *link[position + 1 :]],
            output.name,
        )
        library.replace(output)


def _build(
    output: Path, record: dict[str, Any], compiles: dict[str, Command], link: Command
) -> Path:
    """Build unless the record beside the library says that it was made from the same things."""
    note = output.with_suffix(".json")
    digest = _digest(compiles, record, compiles, link)
    with _locked(output.parent):
        if (
            output.is_file()
            and note.is_file()
            and json.loads(note.read_text(encoding="utf-8")).get("digest") == digest
        ):
            return output
        began = time.monotonic()
        note.unlink(missing_ok=True)
        _compile_and_link(compiles, link, output)
        done = {
            **record,
            "digest": digest,
            "seconds": round(time.monotonic() - began, 1),
            "bytes": output.stat().st_size,
        }
        note.write_text(json.dumps(done, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return output


def _sources(*patterns: str) -> list[str]:
    return sorted(
        str(path.relative_to(_SOURCES)) for pattern in patterns for path in _SOURCES.glob(pattern)
    )


def build_library(arch: str = "all") -> Path:
    """The TensorRT plugin library, compiled if needed.

    It links the CUDA runtime statically, so it loads where there is no driver and no CUDA toolkit.

    Args:
        arch: "all", or compute capabilities such as "80;90".

    Raises:
        InputError: no compiler, or a wrong `arch`.
        UserError: the compiler failed; the message holds its output.
    """
    flags, cuda = _flags(), find_cuda()
    cxx = find_program("g++", "g++")
    architectures = _architectures(arch, flags["architectures"])
    include = [f"-I{folder}" for folder in flags["include"]]
    nvcc = [str(cuda.nvcc), *flags["nvcc"], *_gencode(architectures), *include, f"-I{cuda.include}"]
    host = [cxx, *flags["cxx"], *include, "-isystem", str(cuda.include)]
    compiles = dict.fromkeys(_sources(*KERNEL_SOURCES), nvcc)
    compiles |= dict.fromkeys(_sources(*PLUGIN_SOURCES), host)
    link = [cxx, "-shared", *flags["link"], "{}", f"-L{cuda.lib}", *flags["libraries"]]
    record = {
        "architectures": architectures,
        "nvcc": str(cuda.nvcc),
        "nvcc_version": cuda.version(),
    }
    return _build(build_folder() / PLUGIN_LIBRARY, record, compiles, link)


def build_sim() -> Path:
    """The same kernels compiled with g++, run by plugins/core/sim/simt.h on host memory; needs no
    CUDA compiler.

    Raises:
        InputError: no g++, or no CUDA headers.
        UserError: the compiler failed; the message holds its output.
    """
    flags, cxx = _flags(), find_program("g++", "g++")
    compiler = [cxx, *flags["sim"], "-I.", "-isystem", str(find_cuda_include()), "-x", "c++"]
    compiles = dict.fromkeys(_sources(*KERNEL_SOURCES), compiler)
    version = subprocess.run(
        [cxx, "--version"], capture_output=True, text=True, check=False
    ).stdout.partition("\n")[0]
    return _build(
        build_folder() / SIM_LIBRARY,
        {"compiler": version},
        compiles,
        [cxx, "-shared", "-Wl,--no-undefined", "{}"],
    )


def build_selftest() -> Path:
    """The program anybit-selftest, which loads either library; needs g++ only.

    Raises:
        InputError: no g++.
        UserError: the compiler failed; the message holds its output.
    """
    cxx = find_program("g++", "g++")
    compiler = [cxx, *_flags()["selftest"], "-I."]
    return _build(
        build_folder() / SELFTEST,
        {},
        dict.fromkeys(_sources(*SELFTEST_SOURCES), compiler),
        [cxx, "{}", "-ldl"],
    )


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
    flags, cxx = _flags(), find_program("g++", "g++")
    if arch is None:
        compiler = [cxx, *flags["sim"], "-I.", "-isystem", str(find_cuda_include()), "-x", "c++"]
        link, suffix = [cxx, "-shared", "-Wl,--no-undefined", "{}"], "-sim"
    else:
        cuda = find_cuda()
        compiler = [
            str(cuda.nvcc),
            *flags["nvcc"],
            *_gencode(_architectures(arch, [])),
            "-I.",
            f"-I{cuda.include}",
        ]
        link, suffix = (
            [cxx, "-shared", "{}", f"-L{cuda.lib}", *flags["libraries"]],
            f"-{arch.replace(';', '-')}",
        )
    return _build(
        build_folder() / f"{source.stem}{suffix}.so", {}, {str(source.resolve()): compiler}, link
    )


def build_soname(library: Path, soname: str) -> Path:
    """A tiny library that carries `soname` and pulls in `library`.

    Once loaded, a later dlopen(soname) anywhere in the process finds it, and through it every
    symbol of `library`: no environment variable, no file in a system folder.
    """
    cxx = find_program("g++", "g++")
    folder = build_folder() / f"soname-{hashlib.sha256(str(library).encode()).hexdigest()[:12]}"
    output = folder / soname
    with _locked(folder):
        if not output.is_file():
            temporary = folder / f".{soname}.tmp"
            _run(
                [
                    cxx,
                    "-shared",
                    "-nostdlib",
                    f"-Wl,-soname,{soname}",
                    "-Wl,--no-as-needed",
                    str(library),
                    f"-Wl,-rpath,{library.parent}",
                    "-o",
                    str(temporary),
                ],
                soname,
            )
            temporary.replace(output)
    return output
