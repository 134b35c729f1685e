"""Opens an artefact folder for running: checks what is there against the manifest and picks the
runtime.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.out.files import verify_files
from calibration.out.manifest import MANIFEST, read_manifest
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.quant.folder import QuantModel
    from exporter.run.sessions import DecoderSession

__all__ = ["GENERATE_RUNNERS", "check_artifact", "choose_runner", "open_artifact"]

GENERATE_RUNNERS = ("auto", "onnxruntime", "tensorrt")
_STAGES = {
    "torch": "quant",
    "onnxruntime": "onnx",
    "tensorrt": "engine",
}  # the stage a runner executes
_SMALL = ("quant.json",)  # files of quant/ that quant.json itself cannot vouch for


def _needs(out: Path, stage: str, why: str) -> InputError:
    return InputError(
        str(out),
        f"got no {stage} folder, expected it for {why}",
        f"Make it with: python -m exporter MODEL --wbits W --abits A --until {stage} --out {out}",
    )


def check_artifact(out: Path, runner: str) -> None:
    """Check that OUT holds what `runner` reads, whole and unchanged; quant/ checks its own weights
    when it is read.

    Raises:
        InputError: OUT or a stage is missing, or a file differs from the manifest.
    """
    if not out.is_dir():
        kind = "a file" if out.exists() else "no such folder"
        raise InputError(
            str(out),
            f"got {kind}, expected an artefact folder",
            "Make one with: python -m exporter MODEL --wbits W --abits A --out DIR",
        )
    stage = _STAGES[runner]
    for needed in ("quant", stage):
        if not (out / needed).is_dir():
            raise _needs(out, needed, f"--runner {runner}")
    if stage == "quant" and not (out / MANIFEST).exists():
        return  # made by python -m calibration, which writes quant/ alone
    records = read_manifest(out / MANIFEST)["stages"]
    for needed in ("quant", stage):
        if needed not in records:
            raise _needs(out, needed, f"--runner {runner}, listed in {MANIFEST}")
    verify_files(
        out / "quant",
        {name: record for name, record in records["quant"]["files"].items() if name in _SMALL},
    )
    if stage != "quant":
        verify_files(out / stage, records[stage]["files"])


def choose_runner(out: Path, runner: str) -> str:
    """`runner`, or for "auto" tensorrt where there is a GPU and an engine that fits it, else
    onnxruntime.
    """
    if runner != "auto":
        return runner
    from exporter.engine.edition import check_engine, gpu_capabilities

    stages = read_manifest(out / MANIFEST)["stages"] if (out / MANIFEST).is_file() else {}
    if "engine" not in stages or not gpu_capabilities():
        return "onnxruntime"
    try:
        check_engine(out / "engine")
    except InputError as error:
        print(f"Using onnxruntime: {error}", file=sys.stderr)
        return "onnxruntime"
    return "tensorrt"


def open_artifact(out: Path, runner: str) -> tuple[QuantModel, DecoderSession, str]:
    """The quantised model's description, an open session, and the runner's name ("auto" resolved).

    Raises:
        InputError: as check_artifact, or the runner cannot run here.
    """
    runner = choose_runner(out, runner)
    check_artifact(out, runner)
    from calibration.quant.folder import read_quant
    from exporter.run.sessions import open_session

    quant = read_quant(out / "quant", verify=False)  # the session verifies it
    return quant, open_session(runner, out), runner
