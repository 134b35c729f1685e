"""JSON from anywhere becomes checked values, or an error that names the file and the field."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from calibration.out.json_file import LARGE, Size, checked, parse_json, read_json, read_record
from calibration.out.records import FileName, Sha256
from plugins.errors import InputError

AGAIN = "It is truncated or damaged: make this stage again."


@dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[Size, ...] = ()
    named: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    inner: Inner
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    file: FileName = "a"
    sha: Sha256 = "0" * 64
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, int] = (1, 2)


GOOD = {"name": "a", "inner": {"sizes": [1, 2]}, "share": 0.5}


def test_a_record_is_what_its_class_says(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"name": "a", "inner": {"sizes": [1, 2]}, "more": 1}')
    assert read_record(path, Record) == Record(name="a", inner=Inner(sizes=(1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "f, name: got 3, expected a string."),
        ({"inner": None}, "f, inner: got null, expected an object."),
        ({"inner": {"sizes": [1, "2"]}}, 'f, inner.sizes[1]: got "2", expected a whole number.'),
        ({"inner": {"sizes": [1, True]}}, "f, inner.sizes[1]: got true, expected a whole number."),
        ({"inner": {"sizes": [0]}}, "f, inner.sizes[0]: got 0, expected at least 1."),
        (
            {"inner": {"sizes": [1 << 80]}},
            f"f, inner.sizes[0]: got {1 << 80}, expected at most 2147483647.",
        ),
        ({"share": 2}, "f, share: got 2, expected at most 1."),
        ({"share": "x" * 99}, f'f, share: got "{"x" * 29} ... {"x" * 29}", expected a number.'),
        ({"file": "../a"}, 'f, file: got "../a", expected the name of a file in this folder.'),
        ({"sha": "0"}, 'f, sha: got "0", expected 64 hexadecimal digits.'),
        ({"kind": "c"}, 'f, kind: got "c", expected one of the values it may have.'),
        ({"pair": [1]}, "f, pair: got a list of 1, expected one of 2."),
        ({"name": {}}, "f, name: got an object, expected a string."),
        (
            {"inner": {"named": {"a": "b"}}},
            'f, inner.named["a"]: got "b", expected a whole number.',
        ),
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
        file.truncate((1 << 23) + 1)
    for path, problem in (
        (fifo, "a pipe, expected a JSON file"),
        (tmp_path, "a folder, expected a JSON file"),
        (tmp_path / "none", "no such file, expected a JSON file"),
        (large, "8388609 bytes, expected JSON of at most 8 MB"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(f'{path}: got {problem}. {AGAIN}')}$"):
            read_json(path)
    large.write_text('{"a": ' + " " * (1 << 23) + "1}")
    assert read_json(large, most=LARGE) == {"a": 1}
