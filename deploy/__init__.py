"""Runs what the exporter made: one command each file, found by what they define as COMMAND."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.command import Command

__all__ = ["commands"]


def commands() -> dict[str, Command]:
    """Every command by its name, sorted."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if module.name != "__main__"
    ]
    found: list[Command] = [module.COMMAND for module in modules if hasattr(module, "COMMAND")]
    return {command.name: command for command in sorted(found, key=lambda item: item.name)}
