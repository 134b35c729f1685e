"""A manifest is whole, of this format, or refused with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.out.manifest import open_manifest, read_manifest
from plugins.errors import InputError

FILES = {"a": {"bytes": 3, "sha256": "00"}}
RECORD = {"fingerprint": "f", "seconds": 1.5, "peak_rss": 9, "files": FILES}
WHOLE = {"format": 1, "request": {"model": "m"}, "stages": {"onnx": RECORD, "quant": RECORD}}


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_a_whole_manifest_has_its_stages_in_order(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE))
    assert read_manifest(path) == WHOLE
    assert list(read_manifest(path)["stages"]) == ["quant", "onnx"]


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        ({"request": 3}, "no request"),
        ({"request": None}, "no request"),
        ({"stages": []}, "no stages"),
        *(
            ({"stages": {"quant": {**RECORD, key: None}}}, "a broken record of stage quant")
            for key in (*RECORD, "facts")
        ),
        ({"stages": {"onnx": 3}}, "a broken record of stage onnx"),
        *(
            (
                {"stages": {"quant": {**RECORD, "files": {"a": record}}}},
                "a broken record of quant/a",
            )
            for record in (None, {"bytes": 3}, {"bytes": "3", "sha256": "00"})
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, Any], flaw: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE | change))
    message = (
        f"{path}: got {flaw}, expected the manifest of an artefact folder. "
        "It is damaged: export the model again into a new folder."
    )
    assert refused(lambda: read_manifest(path)) == message
    assert refused(lambda: open_manifest(tmp_path, {"model": "m"})) == message


@pytest.mark.parametrize(
    ("text", "found"), [("{}", "null"), ('{"format": 2}', "2"), ('{"format": "1"}', '"1"')]
)
def test_another_format_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    assert refused(lambda: open_manifest(tmp_path, {})) == (
        f"{path}: got format {found}, expected 1. It is damaged or of another version: export "
        f"the model again into a new folder."
    )


def test_a_truncated_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE)[:40])
    message = refused(lambda: open_manifest(tmp_path, {}))
    assert message.startswith(f"{path}: got unreadable JSON (")
    assert message.endswith(
        "), expected a whole file. It is truncated or damaged: make this stage again."
    )


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
