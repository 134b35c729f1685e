"""Types of the fields that the JSON files of OUT share, files and their checksums above all."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

import msgspec

from calibration.out.json_file import Count

__all__ = ["Bits", "Dtype", "FileName", "FileRecord", "FileRecords", "Sha256"]

# Below the folder of its record: a file of a name that leads elsewhere would be read and copied.
FileName = Annotated[str, msgspec.Meta(pattern=r"^(?!/)(?!(.*/)?\.\.(/|$))[^\x00-\x1f\x7f\\]+$")]
Dtype = Literal["float16", "bfloat16", "float32"]
Bits = Annotated[int, msgspec.Meta(ge=1, le=16)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class FileRecord(TypedDict):
    """Size and checksum of a file."""

    bytes: Count
    sha256: Sha256


FileRecords = dict[FileName, FileRecord]
