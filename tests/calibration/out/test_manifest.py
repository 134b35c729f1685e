"""A manifest is whole, of this format, or refused with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.out.manifest import open_manifest, read_manifest
from plugins.errors import InputError

FILES = {"a": {"bytes": 3, "sha256": 64 * "0"}}
RECORD = {"fingerprint": "f", "seconds": 1.5, "peak_rss": 9, "files": FILES}
WHOLE = {"format": 1, "request": {"model": "m"}, "stages": {"onnx": RECORD, "quant": RECORD}}

AGAIN = "It is damaged or of another version: export the model again into a new folder."


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_a_whole_manifest_has_its_stages_in_order(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE))
    assert read_manifest(path) == WHOLE
    assert list(read_manifest(path)["stages"]) == ["quant", "onnx"]


def with_record(**change: Any) -> dict[str, Any]:
    return {"stages": {"quant": RECORD | change}}


@pytest.mark.parametrize(
    ("change", "place", "problem"),
    [
        ({"request": 3}, "request", "int, expected object"),
        ({"request": None}, "request", "null, expected object"),
        ({"stages": []}, "stages", "array, expected object"),
        ({"command": "python"}, "command", "str, expected array"),
        ({"stages": {"onnx": 3}}, "stages.onnx", "int, expected object"),
        (with_record(fingerprint=None), "stages.quant, fingerprint", "null, expected str"),
        (with_record(seconds="1"), "stages.quant, seconds", "str, expected float"),
        (with_record(peak_rss=True), "stages.quant, peak_rss", "bool, expected int"),
        (with_record(facts=None), "stages.quant, facts", "null, expected object"),
        (with_record(files={"a": None}), "stages.quant, files[...]", "null, expected object"),
        (
            with_record(files={"a": {"bytes": 3}}),
            "stages.quant, files[...]",
            "no sha256, expected a whole record",
        ),
        (
            with_record(files={"a": {"bytes": "3", "sha256": 64 * "0"}}),
            "stages.quant, files[...].bytes",
            "str, expected int",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(
    tmp_path: Path, change: dict[str, Any], place: str, problem: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE | change))
    message = f"{path}, {place}: got {problem}. {AGAIN}"
    assert refused(lambda: read_manifest(path)) == message
    assert refused(lambda: open_manifest(tmp_path, {"model": "m"})) == message


@pytest.mark.parametrize("name", ["../b", "/etc/hosts", "a/../../b", "..", "a\nb", ""])
def test_a_file_lies_below_its_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE | with_record(files={name: FILES["a"]})))
    message = refused(lambda: read_manifest(path))
    assert message.startswith(
        f"{path}, stages.quant, a key of files: got a wrong value (Expected str "
    )


@pytest.mark.parametrize(
    ("text", "found"), [("{}", "null"), ('{"format": 2}', "2"), ('{"format": "1"}', '"1"')]
)
def test_another_format_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    assert refused(lambda: open_manifest(tmp_path, {})) == (
        f"{path}: got format {found}, expected 1. {AGAIN}"
    )


def test_a_truncated_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE)[:40])
    message = refused(lambda: open_manifest(tmp_path, {}))
    assert message.startswith(f"{path}: got unreadable JSON (")
    assert message.endswith(f"), expected a whole file. {AGAIN}")


def test_only_a_finished_stage_makes_a_folder_someones(tmp_path: Path) -> None:
    fresh = {"format": 1, "request": {"model": "n"}, "stages": {}}
    assert open_manifest(tmp_path / "new", {"model": "n"}) == fresh
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE | {"stages": {}}))
    assert open_manifest(tmp_path, {"model": "n"}) == fresh
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE))
    assert refused(lambda: open_manifest(tmp_path, {"model": "n"})) == (
        f'{tmp_path}: got an artifact with model "m", expected model "n". Choose another --out, or '
        f"delete this folder."
    )
