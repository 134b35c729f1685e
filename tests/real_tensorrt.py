"""The TensorRTs that are at hand for tests: TensorRT-RTX where it is installed, and the lean runtimes
of TensorRT 10 and 11 in the folders that ANYBIT_TENSORRT_LEAN names; and what they were seen to do.

tests/tensorrt.json declares what was seen of which version. A test `showing` one of these things has to pass with the
versions it is declared of, and to fail with all others at hand. README has the rows that support_rows()
makes of it (python -m tests.real_tensorrt prints them).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["REAL", "SEEN", "RealTensorrt", "showing", "support_rows"]

# {edition: {version: what was seen of it}}
SEEN: dict[str, dict[str, list[str]]] = json.loads(
    Path(__file__).with_name("tensorrt.json").read_text(encoding="utf-8")
)
# Of each edition: its name, and the versions and GPUs that are supported.
_SUPPORTED = {
    "tensorrt-rtx": ("TensorRT-RTX", "1.7 (compute capability 8.0, 8.6, 8.9, 12.x)"),
    "tensorrt": ("TensorRT", "10.15 or later, 11.x (compute capability 8.0 or later)"),
}


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
# Parameters of a test; one that is skipped where there are none. showing() has them for a test that shows something.
REAL = [pytest.param(one, id=str(one)) for one in _FOUND] or [
    pytest.param(None, marks=_SKIP, id="none")
]


def showing(thing: str) -> Any:
    """Parameters of a test that shows something: those of REAL, of which it has to fail with every
    version that it is not declared of.
    """
    return [
        pytest.param(real, id=str(real), marks=() if declared else _undeclared(real, thing))
        for real in _FOUND
        for declared in [thing in SEEN[real.edition].get(real.version, [])]
    ] or REAL


def _undeclared(real: RealTensorrt, thing: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(
        strict=True, reason=f"tests/tensorrt.json does not say of {real}: {thing}"
    )


def support_rows() -> str:
    """What README's table says of TensorRT: a row per edition."""
    rows = []
    for number, (edition, versions) in enumerate(SEEN.items()):
        name, supported = _SUPPORTED[edition]
        things = ", ".join(next(iter(versions.values())))
        assert all(versions[one] == next(iter(versions.values())) for one in versions), edition
        numbers = ", ".join(version.rsplit(".", 1)[0] for version in versions)
        lean = "" if edition == "tensorrt-rtx" else "lean runtimes of "
        runner = "" if number else "runner `tensorrt` "
        rows.append(f"| {runner}| {name} {supported} | {lean}{numbers}, on a CPU: {things} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(support_rows())
