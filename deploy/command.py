"""What a command of `python -m deploy` declares."""

from __future__ import annotations

import argparse
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from calibration.out.layout import ONNX
from exporter.run import runners
from exporter.run.model import AUTO, CPU
from plugins.errors import InputError

__all__ = ["Command", "add_held_out", "add_progress", "add_runner", "check_file"]


class Command(ABC):
    """One command. A file of deploy/ that defines COMMAND adds one; it imports nothing heavy until
    the command runs.

    Attributes:
        name: as the command line takes it.
        help: one line for the list of commands.
        description: what --help of the command says.
        takes_packs: whether OUT may be a pack, of which it then gets a folder for the time being.
        out_help: what its first argument OUT is; "" where it takes none and gets the working folder.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    description: ClassVar[str]
    takes_packs: ClassVar[bool] = False
    out_help: ClassVar[str] = (
        "artifact folder of python -m exporter, or its onnx or engine folder alone"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027
        """Declare the command's own arguments; OUT is there."""

    @abstractmethod
    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Do the work; raise UserError for what the user can mend."""


def add_runner(parser: argparse.ArgumentParser, default: str) -> None:
    """--runner: auto, cpu or one of exporter/run."""
    found = runners().values()
    automatic = [runner for runner in found if runner.automatic]
    on_cpu = (runner.name for runner in automatic if runner.stage == ONNX)
    choices = [
        f"{AUTO}: {' or '.join(runner.name for runner in automatic)}, by what is there",
        f"{CPU}: {' or '.join(on_cpu)}, by what can run",
        *(f"{runner.name}: {runner.help}" for runner in found),
    ]
    parser.add_argument(
        "--runner",
        choices=(AUTO, CPU, *(runner.name for runner in found)),
        default=default,
        help=f"{'; '.join(choices)} (default {default})",
    )


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """--text and --model, of a command that holds artifacts against their float model."""
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="held-out text (default: the project's own, which is the default of --calib too)",
    )
    add("--model", metavar="MODEL", help="the float model (default: as OUT names it)")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """--progress, of a command that takes long."""
    parser.add_argument(
        "--progress",
        default="auto",
        choices=("auto", "rich", "plain", "json", "none"),
        help="json: one object per line on stdout",
    )


def check_file(option: str, path: Path) -> None:
    """Look whether a result can be written, before the work for it; changes nothing.

    Raises:
        InputError: it is a folder, lies in none, or may not be written.
    """
    problem = ""
    if path.is_dir():
        problem = "a folder"
    elif not path.parent.is_dir():
        problem = f"a file in {path.parent}, which is no folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "a place that may not be written"
    if problem:
        raise InputError(
            f"{option} {path}", f"got {problem}, expected a file to write", "Choose another file"
        )
