"""Types of the fields that the JSON files of OUT share, files and their checksums above all."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

import msgspec

from calibration.out.json_file import FILE_NAME, SHA256, Count

__all__ = ["Bits", "Dtype", "FileName", "FileRecord", "FileRecords", "Sha256"]

FileName = Annotated[str, msgspec.Meta(pattern=FILE_NAME)]
Dtype = Literal["float16", "bfloat16", "float32"]
Bits = Annotated[int, msgspec.Meta(ge=1, le=16)]
Sha256 = Annotated[str, msgspec.Meta(pattern=SHA256)]


class FileRecord(TypedDict):
    """Size and checksum of a file."""

    bytes: Count
    sha256: Sha256


FileRecords = dict[FileName, FileRecord]
