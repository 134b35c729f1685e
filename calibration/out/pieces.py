"""Files that long work makes one after the other, in a folder of their own: what a killed run goes on
from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from calibration.out.files import discard, remove, sha256_file, temporary, write_json
from calibration.out.json_file import read_record
from plugins.errors import InputError

__all__ = ["Pieces"]

_STATE = "state.json"


class _Piece(TypedDict):
    """What a file was made of besides what all depend on, and its checksum."""

    made_of: str
    sha256: str


class _State(TypedDict):
    """What all files depend on, and those that are whole by their names."""

    fingerprint: str
    files: dict[str, _Piece]


class Pieces:
    """A folder of such files, each written whole or not at all, and a record of their checksums.

    Args:
        folder: made if need be.
        fingerprint: of everything that all of them depend on; a folder of another one is emptied.
        keep: go on from the files that are there; else they are thrown away too.
        writes: whether this process may change the folder.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, fingerprint: str, keep: bool = True, writes: bool = True
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        if not writes:
            return
        linked = folder.is_symlink()  # it is not written through
        fresh = linked or not keep or self._state()["fingerprint"] != fingerprint
        try:
            if fresh:
                remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".*.tmp"):  # of a process that was killed
                path.unlink()
        except OSError as error:
            raise InputError(
                str(folder),
                f"got {error.strerror or error}, expected a folder that can be written",
                "Choose another --out",
            ) from error
        if fresh:
            write_json(folder / _STATE, {"fingerprint": fingerprint, "files": {}})

    def _state(self) -> _State:
        try:
            return read_record(self.folder / _STATE, _State)
        except InputError:
            return {"fingerprint": "", "files": {}}

    def recorded(self, name: str) -> str:
        """The SHA-256 with which a file was written; "" where none was."""
        piece = self._state()["files"].get(name)
        return piece["sha256"] if piece else ""

    def whole(self, name: str, made_of: str = "") -> str:
        """The SHA-256 of a file that is as it was written, and was made of the same; else ""."""
        piece, path = self._state()["files"].get(name), self.folder / name
        if piece is None or piece["made_of"] != made_of or not path.is_file():
            return ""
        return piece["sha256"] if sha256_file(path) == piece["sha256"] else ""

    @contextmanager
    def made(self, name: str, made_of: str = "") -> Iterator[Path]:
        """The path at which to write a file; behind the block it is on the disk, under its name, and
        recorded. An error in the block leaves what there was before, and no folder where that is
        nothing; where the record cannot be written, the file counts as missing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)  # an error may have removed it
        unfinished = temporary(self.folder / name)
        try:
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            digest = sha256_file(unfinished)
            unfinished.replace(self.folder / name)
        except BaseException:
            discard(unfinished)
            if not self._state()["files"]:
                self.remove()
            raise
        files = self._state()["files"] | {name: {"made_of": made_of, "sha256": digest}}
        write_json(self.folder / _STATE, {"fingerprint": self.fingerprint, "files": files})

    def give(self, name: str, folder: Path) -> None:
        """Let a file stand in another folder too; where the disk has no second names it goes there."""
        try:
            (folder / name).hardlink_to(self.folder / name)
        except OSError:
            shutil.move(self.folder / name, folder / name)

    def remove(self) -> None:
        """When everything is where it belongs."""
        discard(self.folder)
