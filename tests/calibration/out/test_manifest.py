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
        ({"request": 3}, "request", "3, expected an object"),
        ({"request": None}, "request", "null, expected an object"),
        ({"stages": []}, "stages", "a list of 0, expected an object"),
        ({"command": "python"}, "command", '"python", expected a list'),
        ({"stages": {"onnx": 3}}, "stages.onnx", "3, expected an object"),
        (with_record(fingerprint=None), "stages.quant, fingerprint", "null, expected a string"),
        (with_record(seconds="1"), "stages.quant, seconds", '"1", expected a number'),
        (with_record(peak_rss=True), "stages.quant, peak_rss", "true, expected a whole number"),
        (with_record(facts=None), "stages.quant, facts", "null, expected an object"),
        (with_record(files={"a": None}), 'stages.quant, files["a"]', "null, expected an object"),
        (
            with_record(files={"a": {"bytes": 3}}),
            'stages.quant, files["a"]',
            "no sha256, expected a whole record",
        ),
        (
            with_record(files={"a": {"bytes": "3", "sha256": 64 * "0"}}),
            'stages.quant, files["a"].bytes',
            '"3", expected a whole number',
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
    assert message == (
        f"{path}, stages.quant, a key of files: got a wrong one, expected the name of a file in this "
        f"folder. {AGAIN}"
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
    request = {"model": "n", "seed": 1}
    fresh = {"format": 1, "request": {**request, "content": {"model": "2"}}, "stages": {}}
    assert open_manifest(tmp_path / "new", request, {"model": "2"}) == fresh
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE | {"stages": {}}))
    assert open_manifest(tmp_path, request, {"model": "2"}) == fresh
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE | {"request": {"seed": 2}}))
    assert refused(lambda: open_manifest(tmp_path, request)) == (
        f"{tmp_path}: got an artifact with seed 2, expected seed 1. Choose another --out, or "
        f"delete this folder."
    )


def test_what_is_named_otherwise_is_compared_by_its_content(tmp_path: Path) -> None:
    made = {"model": "model", "calib": "a.txt", "content": {"model": "1", "calib": "7"}}
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE | {"request": made}))
    request = {"model": "/here/model", "calib": "./a.txt"}
    content = {"model": "1", "calib": "7"}
    found = open_manifest(tmp_path, request, content)
    assert found == WHOLE | {"request": {**request, "content": content}}
    changed = {"model": "1", "calib": "8"}  # another text under the same name is made again
    assert open_manifest(tmp_path, {**request, "calib": "a.txt"}, changed)["request"] == {
        **request,
        "calib": "a.txt",
        "content": changed,
    }
    assert refused(lambda: open_manifest(tmp_path, request, changed)) == (
        f'{tmp_path}: got an artifact with calib "a.txt", expected calib "./a.txt". Choose another '
        "--out, or delete this folder."
    )
    other = {"model": "22222222222222", "calib": "7"}
    assert refused(lambda: open_manifest(tmp_path, {"model": "model"}, other)) == (
        f'{tmp_path}: got an artifact of another model or config (model "model", fingerprint 1), expected '
        "those of model (222222222222). Choose another --out."
    )


def test_an_older_manifest_has_its_model_in_quant_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE))
    request, content = {"model": "./m"}, {"model": "1"}
    quant = tmp_path / "quant" / "quant.json"
    quant.parent.mkdir()
    unknown = "What model this folder was made of cannot be told: choose another --out."
    assert refused(lambda: open_manifest(tmp_path, request, content)).startswith(
        f"{quant}: got no such file, "
    )
    for text, problem in (
        ("{}", f"{quant}: got no source, expected a whole record. {unknown}"),
        (
            '{"source": {"fingerprint": 3}}',
            f"{quant}, source.fingerprint: got 3, expected a string. {unknown}",
        ),
        (
            '{"source": {"fingerprint": "2"}}',
            f'{tmp_path}: got an artifact of another model or config (model "m", fingerprint 2), expected '
            "those of ./m (1). Choose another --out.",
        ),
    ):
        quant.write_text(text)
        assert refused(lambda: open_manifest(tmp_path, request, content)) == problem
    quant.write_text('{"source": {"fingerprint": "1"}}')
    assert open_manifest(tmp_path, request, content)["request"]["content"] == content
