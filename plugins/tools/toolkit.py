"""Finds the CUDA compiler and its files: a toolkit that is installed, or the wheels from PyPI."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plugins.errors import InputError

__all__ = [
    "CudaToolkit",
    "compiler_environment",
    "find_compilers",
    "find_cuda",
    "find_cuda_include",
    "find_program",
    "wheel_program",
]

WHEELS = "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"
INSTALL = (
    f"Install the project's requirements (pip install {WHEELS}) or set CUDA_HOME to a CUDA toolkit"
)


@dataclass(frozen=True)
class CudaToolkit:
    """Where nvcc, its headers and the static CUDA runtime are."""

    nvcc: Path
    include: Path
    lib: Path

    def version(self) -> str:
        """The line of `nvcc --version` that names the release."""
        output = subprocess.run(
            [str(self.nvcc), "--version"], capture_output=True, text=True, check=True
        ).stdout
        return next((line for line in output.splitlines() if "release" in line), output.strip())


def compiler_environment() -> dict[str, str]:
    """Environment variables for compilers: these put their temporary files into TMPDIR and fail
    where that is not there, so they get a folder that is.
    """
    return {**os.environ, "TMPDIR": tempfile.gettempdir()}


def _first_with(folders: list[Path], file: str) -> Path | None:
    return next((folder for folder in folders if (folder / file).is_file()), None)


def _toolkit_at(root: Path) -> CudaToolkit | None:
    """The toolkit below `root`; toolkits keep libraries in lib64 or targets/*, wheels in lib."""
    nvcc = root / "bin" / "nvcc"
    targets = sorted(root.glob("targets/*"))
    include = _first_with(
        [root / "include", *(target / "include" for target in targets)], "cuda_runtime.h"
    )
    lib = _first_with(
        [root / "lib64", root / "lib", *(target / "lib" for target in targets)],
        "libcudart_static.a",
    )
    return (
        CudaToolkit(nvcc, include, lib)
        if nvcc.is_file() and include is not None and lib is not None
        else None
    )


def _root_of(nvcc: str) -> Path | None:
    """The toolkit an nvcc on PATH belongs to; asked of nvcc itself, because it may be a wrapper
    script.
    """
    result = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"],
        capture_output=True,
        text=True,
        env=compiler_environment(),
        check=False,
    )
    match = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else None


def _wheel_root() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = (
        [Path(entry) / "cu13" for entry in (spec.submodule_search_locations or ())] if spec else []
    )
    return next(
        (folder for folder in folders if (folder / "include" / "cuda_fp16.h").is_file()), None
    )


def _from_environment() -> CudaToolkit | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            toolkit = _toolkit_at(Path(folder))
            if toolkit is None:
                raise InputError(
                    variable,
                    f"got {folder}, expected a CUDA toolkit: bin/nvcc, headers, libcudart_static.a",
                    "Correct or unset the variable",
                )
            return toolkit
    return None


def find_cuda() -> CudaToolkit:
    """The CUDA compiler: of CUDA_HOME or CUDA_PATH, else on PATH, else of the wheels.

    Raises:
        InputError: there is none, or CUDA_HOME points elsewhere.
    """
    if toolkit := _from_environment():
        return toolkit
    on_path = shutil.which("nvcc")
    roots = [_root_of(on_path) if on_path else None, _wheel_root()]
    for root in roots:
        if root is not None and (toolkit := _toolkit_at(root)):
            return toolkit
    raise InputError(
        "CUDA compiler", "got no nvcc from CUDA_HOME, PATH or the wheels, expected one", INSTALL
    )


def find_cuda_include() -> Path:
    """The folder of cuda_fp16.h, which the CPU simulation needs too; nvcc is not required.

    Raises:
        InputError: there is none.
    """
    if wheels := _wheel_root():
        return wheels / "include"
    return find_cuda().include


def wheel_program(name: str) -> Path | None:
    """A program of the CUDA wheels, such as cuobjdump; None if its wheel is not installed."""
    root = _wheel_root()
    return root / "bin" / name if root is not None and (root / "bin" / name).is_file() else None


def find_compilers() -> None:
    """Check that the plugin library can be compiled here.

    Raises:
        InputError: there is no CUDA compiler, or no g++.
    """
    find_cuda()
    find_program("g++", "g++")


def find_program(name: str, package: str) -> str:
    """Path of a program.

    Raises:
        InputError: it is not on PATH.
    """
    path = shutil.which(name)
    if path is None:
        raise InputError(
            name,
            "got no such program on PATH, expected it",
            f"Install it, such as: apt-get install {package}",
        )
    return path
