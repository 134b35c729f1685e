"""The custom ops, one folder each; the folder's op.py defines SPEC and the registry finds it by op
name.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from plugins.errors import InputError

if TYPE_CHECKING:
    from plugins.core.op_spec import OpSpec

__all__ = ["op_names", "op_spec"]


@cache
def _registry() -> dict[str, OpSpec]:
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/op.py"))
    specs = [importlib.import_module(f"plugins.{folder}.op").SPEC for folder in folders]
    return {spec.name: spec for spec in specs}


def op_names() -> list[str]:
    """Names of every custom op, sorted."""
    return sorted(_registry())


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
