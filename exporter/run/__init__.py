"""The runners of a decoder, one file each, found by what they define as RUNNER."""

from __future__ import annotations

import importlib
import pkgutil

from calibration.out.layout import STAGES
from exporter.run.runner import Runner
from plugins.errors import InputError

__all__ = ["Runner", "find_runner", "runners"]


def runners() -> dict[str, Runner]:
    """Every runner by its name, in the order of the stages they run."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    found: list[Runner] = [module.RUNNER for module in modules if hasattr(module, "RUNNER")]
    found.sort(key=lambda runner: (STAGES.index(runner.stage), runner.name))
    return {runner.name: runner for runner in found}


def find_runner(name: str) -> Runner:
    """The runner called `name`.

    Raises:
        InputError: no such runner.
    """
    found = runners()
    if name not in found:
        raise InputError(
            "--runner", f"got {name!r}, expected {', '.join(found)}", "Choose one of these"
        )
    return found[name]
