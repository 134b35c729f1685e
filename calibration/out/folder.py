"""Opens OUT, or one of its stages copied away alone, for reading: what is there, and that what is
read is what was written.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from calibration.checkpoints.tokenizer import check_named, load_tokenizer
from calibration.out.description import Description, read_description
from calibration.out.files import verify_files
from calibration.out.json_file import checked, read_json
from calibration.out.layout import (
    DESCRIPTION,
    ENGINE,
    ENGINE_RECORD,
    MANIFEST,
    MODEL_FILE,
    ONNX,
    QUANT,
    QUANT_JSON,
)
from calibration.out.manifest import read_manifest
from calibration.out.pack import is_pack
from calibration.out.records import FileName, Sha256
from plugins.errors import InputError

__all__ = ["StageFolder", "command_for", "open_stage", "stages_in"]

_MARKS = {QUANT: QUANT_JSON, ENGINE: ENGINE_RECORD, ONNX: MODEL_FILE}  # a file that no other has
_MAKE = "python -m exporter MODEL --wbits W --abits A"


class _Files(TypedDict):
    """What quant.json says of the files beside it."""

    files: dict[FileName, Sha256]


class StageFolder:
    """A stage's folder. Each file is compared with its record once, when it is asked for; what
    nobody reads is not looked at.

    Attributes:
        path: the folder.
        stage: one of STAGES.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        records: Mapping[str, Mapping[str, Any]],
        renew: str,
        recorder: str = "",
    ) -> None:
        self.path, self.stage = path, stage
        self._unread = dict(records)
        self._known = {*records, recorder}
        self._renew = renew

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files that were recorded."""
        return tuple(sorted(self._known - {""}))

    def file(self, name: str) -> Path:
        """The path of a file, which is whole and unchanged.

        Raises:
            InputError: it is missing, truncated or changed, or nobody recorded it.
        """
        if name not in self._known:
            raise InputError(
                str(self.path / name),
                "got a file without a record, expected one of this stage's",
                self._renew,
            )
        if record := self._unread.get(name):
            verify_files(self.path, {name: record})
            del self._unread[name]
        return self.path / name

    def description(self) -> Description:
        """What model.json says.

        Raises:
            InputError: it is missing, damaged, or of another format.
        """
        if (self.path / DESCRIPTION).is_file():
            self.file(DESCRIPTION)
        return read_description(self.path / DESCRIPTION, self._renew)[0]

    def tokenizer(self, names: Sequence[str]) -> Any:
        """The transformers tokenizer in these files (this imports transformers)."""
        # transformers takes what it finds
        for name in (*names, *check_named(self.path, self._known, self._renew)):
            self.file(name)
        return load_tokenizer(self.path, self._renew)


_RECORDERS = {  # the file that records the others where there is no manifest
    QUANT: QUANT_JSON,
    ONNX: DESCRIPTION,
    ENGINE: DESCRIPTION,
}


def command_for(out: Path, stage: str) -> str:
    """The command that makes a stage of OUT, as its manifest remembers it; for OUT where it lies
    now.
    """
    command: list[str] = []
    if (out / MANIFEST).is_file():
        command = read_manifest(out / MANIFEST).get("command", [])
    if not command:
        return f"{_MAKE} --until {stage} --out {out}"
    kept: list[str] = []
    words = iter(command)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--until", "--engine", "--out"):
            value = value if equals else next(words, "")
        if option == "--engine":
            kept += [option, "auto" if (stage, value) == (ENGINE, "none") else value]
        elif option == "--out":
            kept += [option, str(out)]
        elif option not in ("--until", "--resume"):
            kept.append(word)
    if "--out" not in kept:
        kept += ["--out", str(out)]
    return shlex.join([*kept, "--until", stage, "--resume"])


def stages_in(path: Path) -> tuple[str, ...]:
    """The stages that can be read at `path`: those its manifest lists, or the one that it is.

    Raises:
        InputError: there is no such folder, or its manifest is damaged.
    """
    _check_folder(path)
    if alone := _alone(path):
        return (alone,)
    if (path / MANIFEST).is_file():
        return tuple(read_manifest(path / MANIFEST)["stages"])
    return (QUANT,) if (path / QUANT / QUANT_JSON).is_file() else ()


def open_stage(path: Path, stage: str, why: str) -> StageFolder:
    """The folder of a stage.

    Args:
        path: OUT, or the stage's folder itself.
        stage: one of STAGES.
        why: who wants it, for messages, such as "--runner torch".

    Raises:
        InputError: OUT or the stage is missing, or the manifest is damaged or does not list it.
    """
    _check_folder(path)
    if alone := _alone(path):
        return _open_alone(path, alone, stage, why)
    folder = path / stage
    if not folder.is_dir():
        raise _needs(path, stage, why)
    if stage == QUANT and not (path / MANIFEST).exists():
        return _open_alone(folder, QUANT, stage, why)  # made by python -m calibration
    record = read_manifest(path / MANIFEST)["stages"].get(stage)
    if record is None:
        raise _needs(path, stage, f"{why}, listed in {MANIFEST}")
    return StageFolder(folder, stage, record["files"], f"Renew it with: {command_for(path, stage)}")


def _open_alone(path: Path, found: str, stage: str, why: str) -> StageFolder:
    if found != stage:
        raise InputError(
            str(path),
            f"got the {found} folder of an artifact, expected the whole one or its {stage} folder "
            f"for {why}",
            f"Choose another --runner, or make that stage with: {_MAKE} --until {stage}",
        )
    renew = f"Renew it with: {_MAKE} --until {stage} --out OUT --resume"
    if stage == QUANT:
        record = checked(read_json(path / QUANT_JSON), _Files, str(path / QUANT_JSON), renew)
        records: Mapping[str, Mapping[str, Any]] = {
            name: {"sha256": sha256} for name, sha256 in record["files"].items()
        }
    else:
        records = read_description(path / DESCRIPTION, renew)[1]
    return StageFolder(path, stage, records, renew, _RECORDERS[stage])


def _alone(path: Path) -> str:
    """The stage whose folder `path` is; "" for OUT."""
    if (path / MANIFEST).exists():
        return ""
    return next((stage for stage, mark in _MARKS.items() if (path / mark).is_file()), "")


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        kind = "a file" if path.exists() else "no such folder"
        fix = f"Make one with: {_MAKE} --out DIR"
        if is_pack(path):
            kind = "a pack"
            fix = f"Make one with: python -m deploy unpack {shlex.quote(str(path))} --to DIR --link"
        raise InputError(str(path), f"got {kind}, expected an artifact folder", fix)


def _needs(out: Path, stage: str, why: str) -> InputError:
    return InputError(
        str(out),
        f"got no {stage} folder, expected it for {why}",
        f"Make it with: {command_for(out, stage)}",
    )
