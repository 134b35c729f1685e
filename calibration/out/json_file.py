"""Reads JSON that anybody may have written, changed or damaged, into values that have been checked."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from calibration.out.regular import check_regular
from plugins.errors import InputError
from plugins.text import one_line, shown

__all__ = [
    "FILE_NAME",
    "LARGE",
    "MAKE_AGAIN",
    "SHA256",
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

# Patterns of strings. Below the folder of its record: a file of a name that leads elsewhere would be
# read and copied.
FILE_NAME = r"^(?!/)(?!(.*/)?\.\.(/|$))[^\x00-\x1f\x7f\\]+$"
SHA256 = "^[0-9a-f]{64}$"

_SMALL = 1 << 23  # bytes of a config or a record; those of large models have one or two MB
LARGE = 1 << 28  # of an index, which names every tensor
_DEEPEST = 100
# A message of msgspec's, and the field's place in it: at `$.a.b`, or at `key` in `$.a`.
_PLACE = re.compile(r"(.*?)(?: - at (`key` in )?`\$\.?(.*)`)?", re.DOTALL)
_SHOWN = 60  # characters of a value that stands in a message
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_PATTERNS = {  # as msgspec writes them
    repr(FILE_NAME): "the name of a file in this folder",
    repr(SHA256): "64 hexadecimal digits",
}


def read_json(path: Path, fix: str = MAKE_AGAIN, most: int = _SMALL) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: a regular file.
        fix: what to do about a file that is missing or not whole.
        most: bytes it may have.

    Raises:
        InputError: the file is missing, not regular or too long, is not JSON (NaN, Infinity and
            numbers beyond fp64 are not), is nested deeper than 100 levels, or is not an object.
    """
    try:
        size = check_regular(path, "a JSON file", fix)
        if size > most:
            raise InputError(
                str(path), f"got {size} bytes, expected JSON of at most {most >> 20} MB", fix
            )
        data = path.read_bytes()
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
            where, f"got unreadable JSON ({one_line(error)}), expected a whole file", fix
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
        place, inner = _found(found[3] or "", value, kind, str(error))
        name, got = (f"a key of {place}", "a wrong one") if found[2] else (place, _shown(inner))
        raise InputError(f"{where}, {name}" if name else where, _got(found[1], got), fix) from None


def _found(place: str, value: Any, kind: Any, problem: str) -> tuple[str, Any]:
    """A field's place, with the keys of dicts where msgspec, which names none, writes [...]; and the
    value there.
    """
    whole, text = copy.deepcopy(value), ""
    inner = whole
    for part in re.findall(r"[^.\[\]]+|\[\d+\]|\[\.\.\.\]", place):
        if part == "[...]":
            while len(inner) > 1:  # which half of the entries has the problem?
                entries = list(inner.items())
                half = len(entries) // 2
                inner.clear()
                inner.update(entries[:half])
                if _problem(whole, kind) != problem:
                    inner.clear()
                    inner.update(entries[half:])
            key, inner = next(iter(inner.items()))
            text += f"[{json.dumps(shown(key), ensure_ascii=False)}]"
        elif part.startswith("["):
            inner = inner[int(part[1:-1])]
            text += part
        else:
            inner = inner[part]
            text += f".{part}" if text else part
    return text, inner


def _problem(value: Any, kind: Any) -> str:
    try:
        msgspec.convert(value, kind, strict=True)
    except (ValueError, OverflowError) as error:
        return str(error)
    return ""


def _got(problem: str, got: str) -> str:
    """One of msgspec's messages in our words and order; `got` is the value it is about."""
    plain = problem.replace("`", "")
    if found := re.fullmatch(r"Object missing required field (.+)", plain):
        return f"got no {found[1]}, expected a whole record"
    if found := re.fullmatch(r"Expected array of length (.+), got (.+)", plain):
        return f"got a list of {found[2]}, expected one of {found[1]}"
    if found := re.fullmatch(r"Expected (.+), got (.+)", plain):
        wanted = [_WORDS.get(kind, kind) for kind in found[1].split(" | ")]
        return f"got {got}, expected {' or '.join(wanted)}"
    if plain.startswith("Invalid enum value"):
        return f"got {got}, expected one of the values it may have"
    if found := re.fullmatch(r"Expected \w+ (of length )?(>=|<=|>|<) (.+)", plain):
        number = found[3].removesuffix(".0")
        return (
            f"got {got}, expected {'a length of ' if found[1] else ''}{_BOUNDS[found[2]]} {number}"
        )
    if found := re.fullmatch(r"Expected str matching regex (.+)", plain):
        return f"got {got}, expected {_PATTERNS.get(found[1], 'another string')}"
    return f"got {got} ({one_line(plain)})"


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict):
        return "an object"
    return (
        f"a list of {len(value)}" if isinstance(value, list) else shown(json.dumps(value), _SHOWN)
    )
