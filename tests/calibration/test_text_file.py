"""Text files, recognized by what is in them: plain, JSON, compressed, and what is no text."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from calibration import text_file
from calibration.text_file import bounded, read_text
from plugins.errors import InputError

RECORD = 'Write one object per line: {"text": "..."}'
WORDS = "Grüße and more, "


def _read(path: Path, content: str | bytes, strict: bool = True) -> tuple[str, list[str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said: list[str] = []
    return read_text(path, "--calib", strict, said.append), said


def _refusal(path: Path, content: str | bytes | None = None, strict: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        if content is None:
            read_text(path, "--calib", strict, print)
        else:
            _read(path, content, strict)
    assert caught.value.exit_code == 2
    return str(caught.value)


LINES = '{"text": "one"}\n\n"two"\n{"content": "three", "id": 4}\n'


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.jsonl.gz", "a.b.JSON.GZ"]
)
def test_json_lines(tmp_path: Path, name: str) -> None:
    content = gzip.compress(LINES.encode()) if name.lower().endswith(".gz") else LINES
    assert _read(tmp_path / name, content) == ("one\n\ntwo\n\nthree", [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz"])
def test_content_says_what_a_file_is(tmp_path: Path, name: str, packed: bool) -> None:
    """However it is called: JSON lines, a document of JSON, compressed."""

    def read(text: str) -> str:
        data = text.encode()
        return _read(tmp_path / name, gzip.compress(data) if packed else data)[0]

    assert read("Grüße\n\nand more") == "Grüße\n\nand more"
    assert read('{"text": "one"}\n{"text": "two"}') == "one\n\ntwo"
    records = [{"text": "one"}, {"content": "two"}, "three"]
    assert read(json.dumps(records)) == read(json.dumps(records, indent=2)) == "one\n\ntwo\n\nthree"
    assert read(json.dumps({"text": "one\ntwo"}, indent=2)) == "one\ntwo"
    for plain in (
        "[1] Of rivers",
        '{a}\n{"text": "one"}',
        '"one"\n"two"',
        "{",
        "[1, 2]\n[3]",
        "[1, 2]",
        '[["one"], "two"]',
    ):
        assert read(plain) == plain


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_feeds_alone_end_lines_of_json(tmp_path: Path, mark: str, end: str) -> None:
    """U+2028, U+2029, U+0085, a form feed within a string do not."""
    texts = ["a\u2028b\u2029c", "d\u0085e", "f\x0cg\x1ch", "i\rj\nk"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = mark + end.join(lines) + end
    assert _read(tmp_path / "a.jsonl", content)[0] == "\n\n".join(texts)
    again = content + content  # a file with a mark behind another
    assert _read(tmp_path / "a.jsonl", again)[0] == "\n\n".join([*texts, *texts])


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    for text in (WORDS * 9, '{"text": "' + WORDS + '"}'):
        read, _ = _read(tmp_path / "a.txt", (mark + text).encode(encoding))
        assert read == (WORDS if text.startswith("{") else text)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_ends_of_lines_are_one_kind(tmp_path: Path, end: str) -> None:
    assert _read(tmp_path / "a.txt", f"one{end}two{end}")[0] == "one\ntwo\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "got no valid JSON"),
        ('{"text": NaN}', "got no valid JSON"),
        ('{"text": 1e999}', "got no valid JSON"),
        ("[" * 100_000, "got no valid JSON"),
        ('{"text": "\\ud800"}', "got no valid JSON"),
        ('{"id": 1}', 'got no field "text" with a string'),
        ('{"text": 5}', 'got no field "text" with a string'),
        ("3", 'got no field "text" with a string'),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    message = f"{path}, line 2: {problem}. {RECORD}."
    assert _refusal(path, f'{{"text": "fine"}}\n{line}\n') == message


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ([{"text": "one"}, {"id": 1}], ", record 2"),
        ([["one"], {"text": "two"}], ", record 1"),
        ({"data": [{"text": "one"}]}, ""),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_documents_of_json_without_text(
    tmp_path: Path, name: str, value: object, place: str
) -> None:
    path = tmp_path / name
    message = f'{path}{place}: got no field "text" with a string. {RECORD}.'
    assert _refusal(path, json.dumps(value, indent=1)) == message


@pytest.mark.parametrize(
    ("start", "kind", "fix"),
    [
        (b"\x28\xb5\x2f\xfd\x04\x00", "Zstandard", "Decompress it first"),
        (b"\xfd7zXZ\x00\x00", "xz", "Decompress it first"),
        (b"BZh91AY&SY", "bzip2", "Decompress it first"),
        (b"PK\x03\x04\x14", "zip", "Decompress it first"),
        (b"7z\xbc\xaf\x27\x1c", "7z", "Decompress it first"),
        (b"a.txt".ljust(257, b"\0") + b"ustar", "tar", "Decompress it first"),
        (b"PAR1\x15", "Parquet", text_file._CONVERT),
        (b"ARROW1\0\0", "Arrow", text_file._CONVERT),
        (b"%PDF-1.7\n", "PDF", text_file._CONVERT),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_formats_that_are_no_text(
    tmp_path: Path, start: bytes, kind: str, fix: str, packed: bool
) -> None:
    path, content = tmp_path / "a.txt", start + b"words " * 99
    assert _refusal(path, gzip.compress(content) if packed else content, strict=False) == (
        f"{path}: got a file in {kind} format, expected text, JSON lines or gzip. {fix}."
    )


def test_gzip_that_is_damaged_or_doubled(tmp_path: Path) -> None:
    path, packed = tmp_path / "a.gz", gzip.compress(b"words " * 999)
    damaged = f"{path}: got a damaged gzip file ({{}}). Compress or download it again."
    assert _refusal(path, packed[:-9]) == damaged.format(
        "Compressed file ended before the end-of-stream marker was reached"
    )
    wrong = packed[:-8] + bytes(4) + packed[-4:]
    assert _refusal(path, wrong).startswith(damaged.partition("{")[0])
    assert _refusal(path, gzip.compress(packed)) == (
        f"{path}: got gzip within gzip, expected text within. Decompress it first."
    )


@pytest.mark.parametrize("strict", [False, True])
def test_what_will_hardly_be_text(tmp_path: Path, strict: bool) -> None:
    fix = "It is binary or in another encoding: save it as UTF-8 text"
    path = tmp_path / "a.txt"
    assert _refusal(path, b"word\0 " * 10, strict) == (
        f"{path}: got 10 NUL of 60 characters, expected text. {fix}."
    )
    assert _refusal(path, "word ".encode("utf-16-le") * 9, strict).endswith(f". {fix}.")  # no mark
    replaced = f"{path}: got 2.0% replacement characters (U+FFFD), expected at most 1%. {fix}."
    assert _refusal(path, "\ufffd" * 2 + "x" * 98, strict) == replaced
    assert _refusal(path, '{"text": "\\ufffd\\ufffd' + "x" * 98 + '"}', strict) == replaced
    assert _refusal(path, '{"text": "word\\u0000"}', strict) == (
        f"{path}: got 1 NUL of 5 characters, expected text. {fix}."
    )
    assert _read(path, "\ufffd" + "x" * 99, strict)[0] == "\ufffd" + "x" * 99


def test_a_few_bytes_that_are_no_characters(tmp_path: Path) -> None:
    """Calibration takes what it gets, a score would be another one."""
    path, content = tmp_path / "a.txt", b"one \xff" + b"x" * 99
    assert _read(path, content, strict=False)[0] == "one \ufffd" + "x" * 99
    assert _refusal(path, content) == (
        f"{path}: got a file that is not UTF-8 text ('utf-8' codec can't decode byte 0xff in "
        "position 4: invalid start byte). Save it as UTF-8."
    )
    assert _refusal(path, b"\xff\xfe\x00") == (
        f"{path}: got a file that is not UTF-16-LE text ('utf-16-le' codec can't decode byte 0x00 "
        "in position 0: truncated data). Save it as UTF-8."
    )
    assert "26.7% replacement" in _refusal(path, b"one \xff\xfe three \xff\xff", strict=False)


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((tmp_path, "a folder"), (pipe, "a pipe"), (Path("/dev/zero"), "a device")):
        assert _refusal(path) == (
            f"--calib: got {kind} {path}, expected a .txt or .jsonl file. Check the path, or write "
            "the text into a file."
        )


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.symlink_to(path)
    assert _refusal(path) == (
        f"--calib: got Too many levels of symbolic links {path}, expected a .txt or .jsonl file. "
        "Check the path and the permissions."
    )


@pytest.mark.parametrize("packed", [False, True])
def test_of_a_long_file_the_beginning_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(text_file, "MOST_BYTES", 1 << 20)
    path = tmp_path / "a.txt"

    def read(text: str) -> tuple[str, list[str]]:
        data = text.encode()
        return _read(path, gzip.compress(data) if packed else data)

    note = [f"{path} is long: its first 1 MB are used."]
    assert read("x" + "ü" * (1 << 20)) == ("x" + "ü" * ((1 << 19) - 1) + "ü", note)
    line = json.dumps({"text": "w" * 99})
    text, said = read(f"{line}\n" * 20_000)
    assert said == note
    assert text == "\n\n".join(["w" * 99] * ((1 << 20) // (len(line) + 1)))  # whole lines
    assert read("x" * (1 << 20)) == ("x" * (1 << 20), [])


def test_of_many_texts_the_first_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "MOST_BYTES", 10)
    texts = iter(["four", "five5", "sixsix", "left"])
    assert bounded(texts) == "four\n\nfive5\n\nsixsix"
    assert list(texts) == ["left"]
