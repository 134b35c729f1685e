"""Opens an artifact for running: picks the runner, finds the folder it needs, reads what the model
is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.out.description import Description
from calibration.out.folder import StageFolder, open_stage, stages_in
from exporter.run import Runner, find_runner, runners
from exporter.run.sessions import DecoderSession
from plugins.errors import InputError

__all__ = ["AUTO", "Model", "choose_runner", "find_model", "open_session"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that a runner can open; its weights are not read yet.

    Attributes:
        runner: who runs it.
        folder: the stage's folder.
        description: what the model is.
    """

    runner: Runner
    folder: StageFolder
    description: Description

    def tokenizer(self) -> Any:
        """The transformers tokenizer (this imports transformers)."""
        return self.folder.tokenizer(self.description.tokenizer)

    def open(self) -> DecoderSession:
        """A session, for a with statement.

        Raises:
            InputError: a file is damaged, or the runtime refuses it.
        """
        return self.runner.open(self.folder, self.description)


def choose_runner(path: Path) -> Runner:
    """Of the runners that may be chosen by themselves, the one to be preferred whose stage is there
    and that can run here; that a folder was made for another machine is said on stderr.

    Raises:
        InputError: there is no such folder, or its manifest is damaged.
    """
    automatic = [found for found in runners().values() if found.automatic]
    automatic.sort(key=lambda found: -found.automatic)
    stages = stages_in(path)
    there = [found for found in automatic if found.stage in stages] or automatic
    for found in there[:-1]:
        if found.unavailable():
            continue
        try:
            found.check(open_stage(path, found.stage, _why(found)))
        except InputError as error:
            print(f"Not using {found.name}: {error}", file=sys.stderr)
            continue
        return found
    return there[-1]


def find_model(path: Path, name: str = AUTO) -> Model:
    """The model in an artifact.

    Args:
        path: OUT, or the folder of the stage that the runner needs.
        name: of a runner, or "auto".

    Raises:
        InputError: the runner is unknown or cannot run here; its stage is missing, damaged, or of
            another version.
    """
    chosen = choose_runner(path) if name == AUTO else find_runner(name)
    if error := chosen.unavailable():
        raise error
    folder = open_stage(path, chosen.stage, _why(chosen))
    chosen.check(folder)
    return Model(runner=chosen, folder=folder, description=chosen.describe(folder))


def _why(chosen: Runner) -> str:
    return f"--runner {chosen.name}"


def open_session(name: str, path: Path) -> DecoderSession:
    """A session on an artifact. Raises as find_model and Model.open do."""
    return find_model(path, name).open()
