"""Writes artefact folders so that a reader sees the whole stage or none of it, and checks what it reads back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from plugins.core.errors import InputError, UserError

__all__ = ["StageWriter", "file_records", "read_json", "sha256_file", "verify_files", "write_json"]

_CHUNK = 1 << 22


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 4 MB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; the old file stays whole until the new one is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), "got no such file, expected a JSON file of an artefact folder",
                         "Check the path, or make the artefact with python -m exporter") from None
    except (ValueError, OSError) as error:
        raise InputError(str(path), f"got unreadable JSON ({error}), expected a whole file",
                         "It is truncated or damaged: make this stage again") from None
    if not isinstance(value, dict):
        raise InputError(str(path), f"got a JSON {type(value).__name__}, expected an object", "Make this stage again")
    return value


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"bytes": n, "sha256": hex}} of every file below `folder`, in name order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}


def verify_files(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that every recorded file is there with its size and checksum.

    Raises:
        InputError: a file is missing, truncated or changed; the message names the first.
    """
    fix = "The artefact is damaged: make this stage again"
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            raise InputError(str(path), "got no such file, expected it from the manifest", fix)
        if path.stat().st_size != record["bytes"]:
            raise InputError(str(path), f"got {path.stat().st_size} bytes, expected {record['bytes']}", fix)
        if (got := sha256_file(path)) != record["sha256"]:
            raise InputError(str(path), f"got SHA-256 {got[:12]}..., expected {record['sha256'][:12]}...", fix)


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free


class StageWriter:
    """Context manager for one stage's folder: written under a temporary name, renamed when whole.

    An error or Ctrl-C inside the block removes the temporary folder and leaves an earlier result untouched.

    Args:
        out: the artefact folder OUT.
        stage: the stage's folder below it, such as "quant".
        needed_bytes: estimate of what will be written; checked against the free space first.

    Raises:
        InputError: too little space, or OUT cannot be written.
    """

    def __init__(self, out: Path, stage: str, needed_bytes: int = 0,
                 free_bytes: Callable[[Path], int] = _free_bytes) -> None:
        self.final = out / stage
        self.path = out / f".{stage}.partial"
        free = free_bytes(out)
        if free < needed_bytes:
            raise InputError(str(self.final), f"got {free / 1e6:.0f} MB of free space, expected at least {needed_bytes / 1e6:.0f} MB",
                             "Free some space or choose another --out")

    def __enter__(self) -> StageWriter:
        try:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        except OSError as error:
            self._fail(error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                self._commit()
                return
            except OSError as failure:
                shutil.rmtree(self.path, ignore_errors=True)
                self._fail(failure)
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, UserError) and error.errno is not None:
            self._fail(error)

    def _commit(self) -> None:
        for path in self.path.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        old = self.final.with_name(f".{self.final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.path.rename(self.final)
        shutil.rmtree(old, ignore_errors=True)

    def _fail(self, error: OSError) -> NoReturn:
        raise InputError(str(self.final), f"got {error.strerror or error} while writing, expected a writable folder with enough space",
                         "Check the disk and the permissions; earlier results are whole") from error
