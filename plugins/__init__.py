"""The custom ops, one folder each; the folder's op.py defines SPEC and the registry finds it by op
name.

Another package brings an op without touching this one: an entry point of the group "anybit.ops"
that names its SPEC, such as `toy = "my_package.op:SPEC"`.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugins.errors import InputError

if TYPE_CHECKING:
    from plugins.core.op_spec import OpSpec

__all__ = ["ENTRY_POINTS", "extension_files", "library_ops", "op_names", "op_spec", "ranked_ops"]

ENTRY_POINTS = "anybit.ops"


@cache
def _own() -> dict[str, OpSpec]:
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/op.py"))
    specs = [importlib.import_module(f"plugins.{folder}.op").SPEC for folder in folders]
    return {spec.name: spec for spec in specs}


@cache
def _extensions() -> dict[str, OpSpec]:
    from importlib.metadata import entry_points

    from plugins.core.op_spec import OpSpec

    found: dict[str, OpSpec] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        where, fix = f"custom op {entry.name} = {entry.value}", "Mend or uninstall its package"
        try:
            spec: Any = entry.load()
        except Exception as error:
            raise InputError(where, f"got {error}, expected an OpSpec", fix) from error
        if not isinstance(spec, OpSpec):
            raise InputError(where, f"got {type(spec).__name__}, expected an OpSpec", fix)
        if spec.name in _own() or spec.name in found:
            raise InputError(where, f"got a second op {spec.name}, expected a new name", fix)
        found[spec.name] = spec
    return found


def _registry() -> dict[str, OpSpec]:
    return _own() | _extensions()


def op_names() -> list[str]:
    """Names of every custom op, sorted."""
    return sorted(_registry())


def library_ops() -> list[str]:
    """Names of the ops whose TensorRT plugins are in our library, sorted: those of this package."""
    return sorted(_own())


def ranked_ops() -> list[OpSpec]:
    """Every op, in the order in which they are asked whether they take a scheme."""
    return sorted(_registry().values(), key=lambda spec: (spec.rank, spec.name))


def op_spec(name: str) -> OpSpec:
    """The op called `name`.

    Raises:
        InputError: no such op.
    """
    if name not in _registry():
        raise InputError(
            f"custom op {name!r}",
            f"unknown, expected one of {', '.join(op_names())}",
            "Check the spelling",
        )
    return _registry()[name]


def extension_files() -> list[Path]:
    """The Python files of the ops of other packages: everything beside each op."""
    files = [sys.modules[type(spec).__module__].__file__ for spec in _extensions().values()]
    folders = {Path(file).parent for file in files if file is not None}
    return sorted(path for folder in folders for path in folder.glob("*.py"))
