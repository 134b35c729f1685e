"""The TensorRTs that are at hand for tests: TensorRT-RTX where it is installed, and the lean runtimes
of TensorRT 10 and 11 in the folders that ANYBIT_TENSORRT_LEAN names.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["REAL", "RealTensorrt"]


@dataclass(frozen=True)
class RealTensorrt:
    """One of them.

    Attributes:
        edition: as engine.json names it.
        version: as engine.json has it.
        module: to import, with `path` in front of Python's own.
        library: of the runtime.
        extension: the bindings alone, and the libraries that they need besides the runtime.
    """

    edition: str
    version: str
    module: str
    path: Path
    library: Path
    extension: Path
    besides: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.edition} {self.version}"

    @property
    def layout(self) -> int:
        """The major version whose tables of functions it has."""
        return 10 if self.version.startswith("10.") else 11

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that imports it."""
        path = os.pathsep.join(filter(None, (str(self.path), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path}


def _version(bindings: Path) -> str:
    found = re.search(r'^__version__ = "(.+)"', (bindings / "__init__.py").read_text(), re.M)
    assert found is not None, bindings
    return found[1]


def _rtx() -> list[RealTensorrt]:
    spec = importlib.util.find_spec("tensorrt_rtx_bindings")
    if spec is None or spec.origin is None:
        return []
    bindings = Path(spec.origin).parent
    libraries = bindings.parent / "tensorrt_rtx_libs"
    return [
        RealTensorrt(
            "tensorrt-rtx",
            _version(bindings),
            "tensorrt_rtx",
            bindings.parent,
            libraries / "libtensorrt_rtx.so.1",
            bindings / "tensorrt_rtx.so",
            (libraries / "libtensorrt_onnxparser_rtx.so.1",),
        )
    ]


def _lean(folder: Path) -> RealTensorrt:
    bindings = folder / "tensorrt_lean_bindings"
    (library,) = (folder / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    return RealTensorrt(
        "tensorrt",
        _version(bindings),
        "tensorrt_lean_bindings",
        folder,
        library,
        bindings / "tensorrt_lean.so",
    )


_FOLDERS = os.environ.get("ANYBIT_TENSORRT_LEAN", "")
_SKIP = pytest.mark.skip(
    reason="needs tensorrt-rtx-cu13, or lean runtimes that ANYBIT_TENSORRT_LEAN names (CONTRIBUTING.md)"
)
_FOUND = [*_rtx(), *(_lean(Path(folder)) for folder in _FOLDERS.split(os.pathsep) if folder)]
# Parameters of a test; one that is skipped where there are none.
REAL = [pytest.param(one, id=str(one)) for one in _FOUND] or [
    pytest.param(None, marks=_SKIP, id="none")
]
