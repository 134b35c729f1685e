"""The model families, one declarative file each; the file name is the key.

A folder calibration/families without an __init__.py anywhere else on Python's path adds its files
to these.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from calibration.families.decoder import Decoder, Family, UnsupportedError
from plugins.errors import InputError

__all__ = [
    "Decoder",
    "Family",
    "UnsupportedError",
    "accepted_architectures",
    "aliases",
    "family",
    "family_names",
    "family_of_architecture",
    "own_code",
]

_SHARED = ("decoder", "parts", "steps")  # what families are made of


@cache
def _registry() -> dict[str, Family]:
    here, *_ = __path__
    others = (Path(entry, *__name__.split(".")) for entry in sys.path)
    __path__[:] = [here, *(str(path) for path in others if _adds_files(path))]
    names = sorted(found.name for found in iter_modules(__path__) if _is_family(found.name))
    found = {name: _checked(importlib.import_module(f"{__name__}.{name}"), name) for name in names}
    for name, one in found.items():
        other = _reader(found, one.architecture)
        if other is not None and other is not one:
            raise InputError(
                f"model family {name!r}",
                f"got {one.architecture}, which {other.name!r} reads too, expected one file for it",
                "Take one of the two files away",
            )
    return found


def _checked(module: ModuleType, name: str) -> Family:
    found = getattr(module, "FAMILY", None)
    if not isinstance(found, Family) or found.name != name:
        got = f"a FAMILY named {found.name!r}" if isinstance(found, Family) else "no FAMILY"
        raise InputError(
            f"model family {name!r}, {module.__file__}",
            f"got {got}, expected FAMILY = Family({name!r}, ...)",
            "Correct the file, or take it out of this folder",
        )
    return found


def _reader(families: Mapping[str, Family], architecture: str) -> Family | None:
    return next((one for one in families.values() if one.architecture == architecture), None)


def _adds_files(path: Path) -> bool:
    return path.is_dir() and not (path / "__init__.py").exists()


def _is_family(name: str) -> bool:
    # pytest puts tests/ on the path, and there tests of families lie in a folder of this name.
    return name not in _SHARED and not name.startswith("test_")


def family_names() -> list[str]:
    """Names of every family, sorted."""
    return list(_registry())


def family(name: str) -> Family:
    """The family called `name`.

    Raises:
        InputError: no such family.
    """
    if name not in _registry():
        raise InputError(
            f"model family {name!r}",
            f"unknown, expected one of {', '.join(family_names())}",
            "Make the quantised folder again with this version",
        )
    return _registry()[name]


def aliases() -> dict[str, str]:
    """{short name of a model: the hub id that it stands for}, family by family."""
    return {alias: hub_id for one in _registry().values() for alias, hub_id in one.aliases.items()}


def own_code(architecture: str) -> tuple[str, ...]:
    """What auto_map in a config of this architecture may name; see Family."""
    found = _reader(_registry(), architecture)
    return found.own_code if found else ()


def accepted_architectures() -> list[str]:
    """Every Hugging Face architecture that some family reads."""
    return sorted(found.architecture for found in _registry().values())


def family_of_architecture(architecture: str, where: str) -> Family:
    """The family that reads a Hugging Face architecture.

    Raises:
        InputError: none does; lists those that are read.
    """
    if found := _reader(_registry(), architecture):
        return found
    raise InputError(
        where,
        f"got architecture {architecture}, expected one of {', '.join(accepted_architectures())}",
        "Choose a model of a supported architecture, or add a file to calibration/families",
    )
