"""JSON from anywhere becomes checked values, or an error that names the file and the field."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from calibration.out.json_file import Size, checked, parse_json, read_json, read_record
from plugins.errors import InputError

AGAIN = "It is truncated or damaged: make this stage again."


@dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[Size, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    inner: Inner
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0


GOOD = {"name": "a", "inner": {"sizes": [1, 2]}, "share": 0.5}


def test_a_record_is_what_its_class_says(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"name": "a", "inner": {"sizes": [1, 2]}, "more": 1}')
    assert read_record(path, Record) == Record(name="a", inner=Inner(sizes=(1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "f, name: got int, expected str."),
        ({"inner": {}}, "f, inner: got no sizes, expected a whole record."),
        ({"inner": {"sizes": [1, "2"]}}, "f, inner.sizes[1]: got str, expected int."),
        ({"inner": {"sizes": [1, True]}}, "f, inner.sizes[1]: got bool, expected int."),
        ({"inner": {"sizes": [0]}}, "f, inner.sizes[0]: got a wrong value (Expected int >= 1)."),
        (
            {"inner": {"sizes": [1 << 80]}},
            "f, inner.sizes[0]: got a wrong value (Expected int <= 2147483647).",
        ),
        ({"share": 2}, "f, share: got a wrong value (Expected float <= 1.0)."),
    ],
)
def test_a_field_of_another_type_or_range_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(f'{message} {AGAIN}')}$"):
        checked(GOOD | change, Record, "f")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"a700": {"b": [{"c": 1}, {"c": 2, "d": "x"}]}}, '["a700"]["b"][1]["d"]'),
        ({"a0": {"c": [], "b.[1]": [{"": "x"}]}, "a999": 1}, '["a0"]["b.[1]"][0][""]'),
        ({"z\n" * 999: 1}, '["' + 30 * "z\\n" + " ... " + 30 * "z\\n" + '"]'),
    ],
)
def test_an_entry_is_named_by_its_key(change: dict[str, object], place: str) -> None:
    many: dict[str, object] = {f"a{index}": {} for index in range(1000)}
    with pytest.raises(InputError) as caught:
        checked(many | change, dict[str, dict[str, list[dict[str, int]]]], "f")
    assert caught.value.where == f"f, {place}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1e999}', "Number out of range - at `$[...]`"),
        (b'{"a": NaN}', "JSON is malformed: invalid character (byte 6)"),
        (b'{"a": -Infinity}', "JSON is malformed: invalid character (byte 7)"),
        (b'{"a": "\\ud800"}', "Input data was truncated"),
        (b'{"a": "\xff"}', "Invalid UTF-8 encoded string"),
        (b'{"a": ', "Input data was truncated"),
        (b"", "Input data was truncated"),
        (b"[" * 100_000, "maximum recursion depth exceeded while deserializing an object"),
    ],
)
def test_what_is_not_json_is_refused(text: bytes, reason: str) -> None:
    problem = f"f: got unreadable JSON ({reason}), expected a whole file. {AGAIN}"
    with pytest.raises(InputError, match=f"^{re.escape(problem)}$"):
        parse_json(text, "f")


def test_nesting_has_a_limit() -> None:
    assert parse_json("[" * 100 + "]" * 100, "f")
    with pytest.raises(InputError, match=r"^f: got JSON nested deeper than 100 levels\."):
        parse_json("[" * 102 + "]" * 102, "f")


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with large.open("wb") as file:
        file.truncate((1 << 28) + 1)
    for path, got in ((fifo, "no regular file"), (large, "268435457 bytes")):
        message = f"{path}: got {got}, expected JSON of at most 256 MB. {AGAIN}"
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            read_json(path)
