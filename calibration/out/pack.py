"""One file that holds an artifact, to be mapped or unpacked.

The members come first, each from a multiple of ALIGNMENT on and as it is, then an index in JSON, then a
footer of fixed length: a mark, where the index is, and its SHA-256. The index has name, place, size and
SHA-256 of every member. The largest data comes first: the data file of an ONNX model lies at the very
beginning, so that offsets into it are offsets into the pack, and a link to the pack can stand in its
place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from calibration.out.files import temporary
from calibration.out.json_file import LARGE, Count, checked, parse_json
from calibration.out.layout import DATA_FILE, MANIFEST, ONNX, STAGES
from calibration.out.records import FileName, Sha256
from calibration.out.regular import check_regular
from plugins.errors import InputError
from plugins.text import shown

__all__ = ["ALIGNMENT", "LINKED", "SUFFIX", "Member", "Pack", "is_pack", "write_pack"]

ALIGNMENT = 1 << 16  # pages of every system, and where Windows maps a file
SUFFIX = ".anybit"
LINKED = f"{ONNX}/{DATA_FILE}"  # at the beginning
FORMAT = 1

_MARK = b"anybit pack\n\x1a\x00\x00\x01"
_FOOTER = struct.Struct(
    f"<{len(_MARK)}sQQ32s"
)  # the mark, place and size of the index, its SHA-256
_CHUNK = 1 << 22
_AGAIN = "It is cut, damaged or no pack: get it again, or make it with python -m deploy pack"


class _Entry(TypedDict):
    name: FileName
    offset: Count
    bytes: Count
    sha256: Sha256


class _Index(TypedDict):
    """What the index holds, its format aside."""

    members: list[_Entry]


@dataclass(frozen=True)
class Member:
    """A file in a pack.

    Attributes:
        name: relative to OUT, such as onnx/model.onnx.
        offset, bytes: where it lies.
        sha256: of it, hex.
    """

    name: str
    offset: int
    bytes: int
    sha256: str


def is_pack(path: Path) -> bool:
    """Whether a file ends as a pack does, or has its name."""
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - _FOOTER.size, 0))
        return file.read(len(_MARK)) == _MARK
    return False


def write_pack(
    path: Path, files: Mapping[str, Path], each: Callable[[str], None] = lambda name: None
) -> list[Member]:
    """Write a pack; an earlier one stays whole until the new one is on the disk.

    Args:
        path: of the pack.
        files: by their names in it.
        each: told every name when its file is written.

    Raises:
        InputError: it cannot be written.
    """
    unfinished = temporary(path)
    members: list[Member] = []
    try:
        with unfinished.open("xb") as file:
            for name in sorted(files, key=lambda name: (name != LINKED, name)):
                file.write(bytes(-file.tell() % ALIGNMENT))
                members.append(_copied(name, files[name], file))
                each(name)
            index = json.dumps({"format": FORMAT, "members": [vars(item) for item in members]})
            place, data = file.tell(), index.encode()
            file.write(data)
            file.write(_FOOTER.pack(_MARK, place, len(data), hashlib.sha256(data).digest()))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(
            str(path),
            f"got {error.strerror or error} while writing, expected a place with enough space",
            "Check the disk and the permissions; an earlier file is whole",
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return members


def _copied(name: str, source: Path, target: BinaryIO) -> Member:
    digest, offset = hashlib.sha256(), target.tell()
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return Member(name, offset, target.tell() - offset, digest.hexdigest())


class Pack:
    """A pack for reading. Its index is checked when it is opened, a member when it is read.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        members: by their names.

    Raises:
        InputError: it is no pack, cut, or its index is damaged or leads out of the file or of a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = check_regular(path, "a pack", _AGAIN)
        self.members = {member.name: member for member in self._read_index()}

    def _refused(self, got: str, expected: str = "a whole pack") -> InputError:
        return InputError(str(self.path), f"got {got}, expected {expected}", _AGAIN)

    def _read_index(self) -> list[Member]:
        with self.path.open("rb") as file:
            file.seek(max(self._size - _FOOTER.size, 0))
            footer = file.read(_FOOTER.size)
            if len(footer) < _FOOTER.size or not footer.startswith(_MARK):
                raise self._refused("a file that does not end as a pack does")
            _, place, length, wanted = _FOOTER.unpack(footer)
            if place + length + _FOOTER.size != self._size or length > LARGE:
                raise self._refused(f"an index at {place} of {length} bytes in {self._size}")
            file.seek(place)
            data = file.read(length)
        if hashlib.sha256(data).digest() != wanted:
            raise self._refused("an index with another checksum")
        where = f"{self.path}, index"
        index = parse_json(data, where, _AGAIN)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise InputError(where, f"got another format, expected {FORMAT}", _AGAIN)
        entries = checked(index, _Index, where, _AGAIN)["members"]
        members = [Member(**entry) for entry in entries]
        self._check(members, place)
        return members

    def _check(self, members: list[Member], end: int) -> None:
        """Look whether members follow each other without gaps and have names of an artifact."""
        at, names = 0, set[str]()
        for member in members:
            if member.offset != at + -at % ALIGNMENT or member.offset + member.bytes > end:
                raise self._refused(f"{shown(member.name)} at {member.offset}", "members in a row")
            first, _, rest = member.name.partition("/")
            if member.name in names or not (
                member.name == MANIFEST or (first in STAGES and rest and "//" not in member.name)
            ):
                raise self._refused(f"a member {shown(member.name)!r}", "files of an artifact")
            names.add(member.name)
            at = member.offset + member.bytes
        for name in names:
            if any(other.startswith(f"{name}/") for other in names):
                raise self._refused(f"{shown(name)} as a file and a folder", "files of an artifact")

    def pieces(self, name: str) -> Iterator[bytes]:
        """A member in pieces.

        Raises:
            InputError: it is not what the index says; after the last piece.
        """
        member, digest = self.members[name], hashlib.sha256()
        left = member.bytes
        with self.path.open("rb") as file:
            file.seek(member.offset)
            while left and (chunk := file.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
                yield chunk
        if left or digest.hexdigest() != member.sha256:
            raise InputError(
                f"{self.path}, {name}",
                f"got SHA-256 {digest.hexdigest()[:12]}..., expected {member.sha256[:12]}...",
                _AGAIN,
            )

    def extract(self, name: str, folder: Path) -> Path:
        """Write a member below a folder; returns its path there. Raises as pieces does."""
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in self.pieces(name):
                file.write(piece)
        return path

    def json(self, name: str) -> dict[str, Any]:
        """A member that is a JSON object. Raises as pieces does, and where it is none."""
        where = f"{self.path}, {name}"
        value = parse_json(b"".join(self.pieces(name)), where, _AGAIN)
        if not isinstance(value, dict):
            raise InputError(
                where, f"got a JSON {type(value).__name__}, expected an object", _AGAIN
            )
        return value

    def sha256(self) -> str:
        """Of the whole file, hex; the member at its beginning is held against its checksum on the way.
        Raises as pieces does.
        """
        first = next(iter(self.members.values()))
        digest = hashlib.sha256()
        for piece in self.pieces(first.name):
            digest.update(piece)
        with self.path.open("rb") as file:
            file.seek(first.bytes)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def link(self, name: str, folder: Path) -> Path:
        """Let a second name of the pack itself stand for the member at its beginning.

        Raises:
            InputError: the file system has no hard links, or the folder is on another one.
        """
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.hardlink_to(self.path)
        except OSError as error:
            got = "another file system" if error.errno == errno.EXDEV else error.strerror
            raise InputError(
                "--link",
                f"got {got} for {folder}, expected one where {self.path.name} can have a second name",
                "Choose a folder beside the pack, or leave out --link",
            ) from None
        return path
