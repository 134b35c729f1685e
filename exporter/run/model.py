"""Opens an artifact for running: picks the runner, finds the folder it needs, reads what the model
is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from calibration.out.description import Description
from calibration.out.folder import StageFolder, open_stage, stages_in
from calibration.out.layout import ONNX
from exporter.run import Runner, find_runner, runners
from exporter.run.sessions import DecoderSession
from plugins.errors import InputError

__all__ = ["AUTO", "CPU", "Model", "choose_runner", "find_model", "open_session"]

AUTO = "auto"
CPU = "cpu"


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


def choose_runner(path: Path, stage: str | None = None) -> Runner:
    """Of the runners that may be chosen by themselves, the one to be preferred whose stage is there
    and that can run here. Said on stderr: that a folder was made for another machine, and that a
    slower runner of the same folder takes another's place.

    Args:
        path: OUT, or the folder of a stage.
        stage: only runners of this one.

    Raises:
        InputError: there is no such folder, or its manifest is damaged.
    """
    automatic = [
        found for found in runners().values() if found.automatic and stage in (None, found.stage)
    ]
    automatic.sort(key=lambda found: -found.automatic)
    stages = stages_in(path)
    there = [found for found in automatic if found.stage in stages] or automatic
    for found, next_one in pairwise(there):
        if error := found.unavailable():
            if next_one.stage == found.stage:
                print(f"Running {next_one.name}, which is slower: {error}", file=sys.stderr)
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
        name: of a runner; "cpu", one of the ONNX file; or "auto".

    Raises:
        InputError: the runner is unknown or cannot run here; its stage is missing, damaged, or of
            another version.
    """
    if name in (AUTO, CPU):
        chosen = choose_runner(path, ONNX if name == CPU else None)
    else:
        chosen = find_runner(name)
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
