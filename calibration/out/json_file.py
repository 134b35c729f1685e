"""Reads JSON that anybody may have written, changed or damaged, into values that have been checked."""

from __future__ import annotations

import copy
import json
import re
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from plugins.errors import InputError
from plugins.text import shown

__all__ = [
    "MAKE_AGAIN",
    "Count",
    "Size",
    "TokenId",
    "checked",
    "parse_json",
    "read_json",
    "read_record",
]

T = TypeVar("T")

MAKE_AGAIN = "It is truncated or damaged: make this stage again"
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]  # of bytes or weights
Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]  # of a dimension of a tensor
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

_MOST_BYTES = 1 << 28  # tokenizers, the largest of these files, have some 10 MB
_DEEPEST = 100
# A message of msgspec's, and the field's place in it: at `$.a.b`, or at `key` in `$.a`.
_PLACE = re.compile(r"(.*?)(?: - at (`key` in )?`\$\.?(.*)`)?", re.DOTALL)
_LONGEST = 200  # characters of a reason that stands in a message


def read_json(path: Path, fix: str = MAKE_AGAIN) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: a regular file of at most 256 MB.
        fix: what to do about a file that is not whole.

    Raises:
        InputError: the file is missing, not regular or too long, is not JSON (NaN, Infinity and
            numbers beyond fp64 are not), is nested deeper than 100 levels, or is not an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            got = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
            raise InputError(
                str(path), f"got {got}, expected JSON of at most {_MOST_BYTES >> 20} MB", fix
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            str(path),
            "got no such file, expected a JSON file of an artifact folder",
            "Check the path, or make the artifact with python -m exporter",
        ) from None
    except OSError as error:
        raise InputError(
            str(path), f"got {error.strerror}, expected a JSON file", "Check the permissions"
        ) from None
    value = parse_json(data, str(path), fix)
    if not isinstance(value, dict):
        raise InputError(str(path), f"got a JSON {type(value).__name__}, expected an object", fix)
    return value


def parse_json(data: bytes | str, where: str, fix: str = MAKE_AGAIN) -> Any:
    """Parse JSON text.

    Raises:
        InputError: it is not JSON (NaN, Infinity and numbers beyond fp64 are not), or is nested
            deeper than 100 levels.
    """
    try:
        value = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise InputError(
            where, f"got unreadable JSON ({_short(str(error))}), expected a whole file", fix
        ) from None
    if _deeper(value, _DEEPEST):
        raise InputError(where, f"got JSON nested deeper than {_DEEPEST} levels", fix)
    return value


def _deeper(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def read_record(path: Path, kind: type[T], fix: str = MAKE_AGAIN) -> T:
    """Read a JSON object as a dataclass, or whatever `kind` is. Raises as read_json and checked."""
    return checked(read_json(path, fix), kind, str(path), fix)


def checked(value: Any, kind: type[T], where: str, fix: str = MAKE_AGAIN) -> T:
    """Make a `kind` of what JSON gave: each field has its type, none is missing.

    Args:
        value: as read_json or parse_json returns it.
        kind: a dataclass, a dict, list or tuple type of such; bounds are given as
            Annotated[int, msgspec.Meta(ge=1)]. Fields that it does not have are left out.
        where: the file.
        fix: what to do about a value that does not fit.

    Raises:
        InputError: it does not fit; the message names the field.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except (ValueError, OverflowError) as error:
        found = _PLACE.fullmatch(str(error))
        assert found is not None  # its first part takes any text
        place = _with_keys(found[3] or "", value, kind, str(error))
        problem, name = found[1], f"{'a key of ' if found[2] else ''}{place}"
        raise InputError(f"{where}, {name}" if name else where, _got(problem), fix) from None


def _with_keys(place: str, value: Any, kind: Any, problem: str) -> str:
    """A field's place with the keys of dicts where msgspec, which names none, writes [...]."""
    if "[...]" not in place:
        return place
    whole, found = copy.deepcopy(value), ""
    inner = whole
    for part in re.findall(r"[^.\[\]]+|\[\d+\]|\[\.\.\.\]", place):
        if part == "[...]":
            if not isinstance(inner, dict):
                return place
            while len(inner) > 1:  # which half of the entries has the problem?
                entries = list(inner.items())
                half = len(entries) // 2
                inner.clear()
                inner.update(entries[:half])
                if _problem(whole, kind) != problem:
                    inner.clear()
                    inner.update(entries[half:])
            key, inner = next(iter(inner.items()))
            found += f"[{json.dumps(shown(key), ensure_ascii=False)}]"
        elif part.startswith("["):
            inner = inner[int(part[1:-1])]
            found += part
        else:
            inner = inner[part]
            found += f".{part}" if found else part
    return found


def _problem(value: Any, kind: Any) -> str:
    try:
        msgspec.convert(value, kind, strict=True)
    except (ValueError, OverflowError) as error:
        return str(error)
    return ""


def _got(problem: str) -> str:
    """Put one of msgspec's messages in our order."""
    plain = problem.replace("`", "")
    if found := re.fullmatch(r"Expected (.+), got (.+)", plain):
        return f"got {found[2]}, expected {found[1]}"
    if found := re.fullmatch(r"Object missing required field (.+)", plain):
        return f"got no {found[1]}, expected a whole record"
    return f"got a wrong value ({_short(plain)})"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
