"""Looks whether the files of an artifact are those that were written, and belong together: what no
run would show, or only by numbers that nobody can explain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.folder import open_stage, stages_in
from calibration.out.layout import (
    DATA_FILE,
    ENGINE,
    ENGINE_FILE,
    ENGINE_RECORD,
    MANIFEST,
    MODEL_FILE,
    ONNX,
    QUANT,
)
from calibration.out.manifest import read_manifest
from exporter.engine.record import read_engine_record
from exporter.proof.options import proof_text
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from exporter.proof.scope import Scope

__all__ = ["check_files", "check_tokenizer"]

_TOKENIZED = 100_000  # characters on which two tokenizers are compared
_GRAPH = (MODEL_FILE, DATA_FILE)


def check_files(out: Path) -> None:
    """Compare every file of quant/, onnx/ and, where there is one, engine/ with its checksum, and
    the folders with each other: one tokenizer, and an engine of this very ONNX file with the plugin
    library that it was built with.

    Raises:
        InputError: a stage is missing, or a file is missing, changed, or another artifact's; the
            message names the first.
    """
    stages = [QUANT, ONNX, *([ENGINE] if ENGINE in stages_in(out) else [])]
    folders = {stage: open_stage(out, stage, "the proof") for stage in stages}
    for folder in folders.values():
        for name in folder.names:
            folder.file(name)
    records = {
        stage: record["files"] for stage, record in read_manifest(out / MANIFEST)["stages"].items()
    }
    tokenizer = folders[ONNX].description().tokenizer
    for stage in stages[1:]:
        for name in tokenizer:
            _check_same(out, stage, name, records[stage], records[QUANT])
    if ENGINE in folders:
        _check_engine(out, records)


def _check_same(
    out: Path, stage: str, name: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    if found.get(name) != expected.get(name):
        raise InputError(
            str(out / stage / name),
            f"got a file of the tokenizer that is not the one in {QUANT}/, expected the same",
            f"It is another model's, or the {stage} stage is stale: make this stage again",
        )


def _check_engine(out: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    record = read_engine_record(out / ENGINE)
    library = record["plugin_library"]
    got = records[ENGINE][library["name"]]["sha256"]
    if got != library["sha256"]:
        raise InputError(
            str(out / ENGINE / library["name"]),
            f"got a plugin library of another build ({got[:12]}...), expected the one that the "
            f"engine was built with ({library['sha256'][:12]}...)",
            "Build the engine again",
        )
    for name, built_from in record.get("source", {}).items():
        now = records[ONNX].get(name, {}).get("sha256", "")
        if now != built_from:
            raise InputError(
                str(out / ENGINE / ENGINE_FILE),
                f"got a stale engine, built from {name} {built_from[:12]}..., expected one of the "
                f"{name} in {ONNX}/ ({now[:12]}...)",
                f"Build the engine again; {ENGINE_RECORD} says what it was made with",
            )


def check_tokenizer(scope: Scope, checkpoint: Checkpoint) -> None:
    """Hold the tokenizer in quant/ against the float model's, on the proof's text.

    Raises:
        CheckError: it gives other tokens.
    """
    text = proof_text(scope.options)[:_TOKENIZED]
    mine, theirs = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for tokenizer in (scope.quant.tokenizer(), checkpoint.tokenizer())
    )
    if mine == theirs:
        return
    place = next(
        (place for place, pair in enumerate(zip(mine, theirs, strict=False)) if len(set(pair)) > 1),
        min(len(mine), len(theirs)),
    )
    got, expected = (
        f"token {tokens[place]}" if place < len(tokens) else "the end" for tokens in (mine, theirs)
    )
    raise CheckError(
        f"{scope.out / QUANT}, tokenizer",
        f"got {got} at place {place} of the text, expected {expected} as the float model's "
        "tokenizer gives",
        "It is another model's: quantize the model again",
    )
