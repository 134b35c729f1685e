"""Processes of their own that are ready at once: forked from one that has imported whatever the
command lines load.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

__all__ = ["FORKS", "PATIENCE", "Fork", "Started", "run_command"]

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "calibration.quant.quantize",
        "calibration.methods.abq",
        "calibration.methods.qqq",
        "exporter.graph.decoder",
        "exporter.proof.onnx_levels",
        "exporter.proof.prove",
        "exporter.report.report",
        "onnxruntime",
        "polygraphy.comparator",
        "pytest",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)
PATIENCE = 300  # seconds, on a machine that is busy
Started = tuple[int, str, str]  # exit code, stdout, stderr


@dataclass(frozen=True)
class Fork:
    """A process that runs work(*arguments) with its output in files of `folder`.

    Attributes:
        folder: for the two files, which exists.
        name: begins their names.
        environment: changes to this process's.
        place: the folder that it works in.
    """

    folder: Path
    name: str = "fork"
    environment: Mapping[str, str] | None = None
    place: Path = REPOSITORY

    def start(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """The process, begun; it does not outlive this one."""
        process = FORKS.Process(target=self._run, args=(work, *arguments), daemon=True)
        process.start()
        return process

    def _run(self, work: Callable[..., Any], *arguments: Any) -> None:
        import torch

        torch.set_num_threads(1)  # others may run beside it
        os.environ.update(self.environment or {})
        os.chdir(self.place)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self._file(name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        try:
            code = work(*arguments) or 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def end(self, process: Any) -> Started:
        """Wait for it: its exit code, stdout and stderr."""
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"it hung: {self.text('err')}")
        return process.exitcode, self.text("out"), self.text("err")

    def text(self, name: str) -> str:
        """What it has said so far on "out" or "err"."""
        return self._file(name).read_text(encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.name}.{name}"


def _main(module: str, words: list[str]) -> int:
    return int(import_module(f"{module}.__main__").main(words))


def run_command(folder: Path, module: str, *words: str, **fork: Any) -> Started:
    """What `python -m module words` does; see Fork for the rest."""
    made = Fork(folder, **fork)
    return made.end(made.start(_main, module, list(words)))
