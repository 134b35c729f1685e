"""Reads a text file by what is in it: plain text, JSON lines or a JSON document, also compressed with
gzip; refuses what is no text.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from calibration.out.json_file import parse_json
from calibration.out.regular import check_regular
from plugins.errors import InputError

__all__ = ["MOST_BYTES", "TEXT_FIELDS", "Say", "bounded", "existing", "read_text"]

# What calibration or an evaluation can use: some eight million tokens. More only takes memory.
MOST_BYTES = 1 << 25
_MOST_REPLACED = 0.01  # share of U+FFFD, which stands where bytes were no character
_JSON = (".json", ".jsonl", ".ndjson")
TEXT_FIELDS = ("text", "content")
_RECORD = 'Write one object per line: {"text": "..."}'
_GZIP = b"\x1f\x8b"
_UNPACK = "Decompress it first"
_CONVERT = 'Write its text into a .txt file, or one {"text": "..."} per line into a .jsonl file'
_FORMATS = (  # offset, bytes there, name, what to do
    (0, b"\x28\xb5\x2f\xfd", "Zstandard", _UNPACK),
    (0, b"\xfd7zXZ\0", "xz", _UNPACK),
    (4, b"1AY&SY", "bzip2", _UNPACK),
    (0, b"PK\x03\x04", "zip", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "7z", _UNPACK),
    (257, b"ustar", "tar", _UNPACK),
    (0, b"PAR1", "Parquet", _CONVERT),
    (0, b"ARROW1", "Arrow", _CONVERT),
    (0, b"%PDF-", "PDF", _CONVERT),
)
_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
Say = Callable[[str], None]


def read_text(path: Path, where: str, strict: bool, say: Say) -> str:
    """The text in a file; of JSON the field "text" or "content" of every record, with an empty line
    between them.

    Args:
        path: a regular file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.
        where: the option named in errors.
        strict: refuse bytes that are no characters; else they become U+FFFD.
        say: told when the file is so long that only its beginning is used.

    Raises:
        InputError: it is no regular file, cannot be read, is of a known format that is no text,
            holds NUL or more than 1 % of U+FFFD, or JSON without such a field.
    """
    data = _content(path, where)
    text = _decoded(path, data, strict)
    more = len(data) > MOST_BYTES
    if more:
        say(f"{path} is long: its first {MOST_BYTES >> 20} MB are used.")
    _check(path, text)
    records = _json_records(path, text, more)
    if records is None:
        return text
    text = "\n\n".join(_text(place, record) for place, record in records)
    _check(path, text)
    return text


def existing(name: str) -> Path | None:
    """What lies at a path, which may begin with ~; None where nothing does, or nothing can."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long a name, no such home
        return None


def bounded(texts: Iterable[str]) -> str:
    """As many of the texts as are used at most, with an empty line between them."""
    taken, length = [], 0
    for text in texts:
        taken.append(text)
        length += len(text)
        if length > MOST_BYTES:
            break
    return "\n\n".join(taken)


def _content(path: Path, where: str) -> bytes:
    """The first bytes of a file, decompressed; more than MOST_BYTES of them if there are."""
    fix = "Check the path, or write the text into a file"
    check_regular(path, "a .txt or .jsonl file", fix, option=where)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if not data.startswith(_GZIP):
            _refuse_formats(path, data)
            return data
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            str(path), f"got a damaged gzip file ({error})", "Compress or download it again"
        ) from None
    except OSError as error:
        raise InputError(
            where, f"got {error.strerror} at {path}, expected a text file", "Check the permissions"
        ) from None
    if data.startswith(_GZIP):
        raise InputError(str(path), "got gzip within gzip, expected text within", _UNPACK)
    _refuse_formats(path, data)
    return data


def _refuse_formats(path: Path, data: bytes) -> None:
    for offset, magic, name, fix in _FORMATS:
        if data[offset : offset + len(magic)] == magic:
            raise InputError(
                str(path), f"got a file in {name} format, expected text, JSON lines or gzip", fix
            )


def _decoded(path: Path, data: bytes, strict: bool) -> str:
    mark, encoding = next((found for found in _MARKS if data.startswith(found[0])), (b"", "UTF-8"))
    decoder = codecs.getincrementaldecoder(encoding)("strict" if strict else "replace")
    try:  # a character that the end of what is used cuts is left out
        text = decoder.decode(data[len(mark) :], final=len(data) <= MOST_BYTES)
    except UnicodeDecodeError as error:
        raise InputError(
            str(path), f"got a file that is not {encoding} text ({error})", "Save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check(path: Path, text: str) -> None:
    """Raises: InputError: so much is no character that it will hardly be text."""
    fix = "It is binary or in another encoding: save it as UTF-8 text"
    if nuls := text.count("\0"):
        raise InputError(str(path), f"got {nuls} NUL of {len(text)} characters, expected text", fix)
    replaced = text.count("\ufffd")
    if replaced > _MOST_REPLACED * len(text):
        raise InputError(
            str(path),
            f"got {replaced / len(text):.1%} replacement characters (U+FFFD), expected at most "
            f"{_MOST_REPLACED:.0%}",
            fix,
        )


def _json_records(path: Path, text: str, more: bool) -> list[tuple[str, Any]] | None:
    """The records of JSON lines or of a JSON document, each with its place; None of other text.

    A file that is not called JSON is taken for it where every line, or all of it, is JSON and there
    is an object among the records: lists in brackets may stand in plain text.
    """
    name = path.stem if path.suffix.lower() == ".gz" else path.name
    called = name.lower().endswith(_JSON)
    if not called and text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        records = _lines(path, text, more)
        if len(records) == 1 and isinstance(records[0][1], list):
            records = _document(path, records[0][1])
    except InputError as error:
        try:
            records = _document(path, parse_json(text, str(path)))
        except InputError:
            if called:
                raise error from None
            return None
    return records if called or any(isinstance(one, dict) for _, one in records) else None


def _document(path: Path, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, list):
        return [(str(path), value)]
    return [(f"{path}, record {number}", record) for number, record in enumerate(value, 1)]


def _lines(path: Path, text: str, more: bool) -> list[tuple[str, Any]]:
    """One value a line; lines end with a line feed alone, since strings may hold U+2028 or U+0085."""
    lines = text.split("\n")
    if more and len(lines) > 1:
        del lines[-1]  # cut
    return [
        (f"{path}, line {number}", _parsed(f"{path}, line {number}", line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _parsed(place: str, line: str) -> Any:
    try:
        return parse_json(line.lstrip("\ufeff"), place)  # of a file that was put behind another
    except InputError:
        raise InputError(place, "got no valid JSON", _RECORD) from None


def _text(place: str, record: Any) -> str:
    if isinstance(record, str):
        return record
    fields = record if isinstance(record, dict) else {}
    text = next((fields[name] for name in TEXT_FIELDS if name in fields), None)
    if not isinstance(text, str):
        raise InputError(place, 'got no field "text" with a string', _RECORD)
    return text
