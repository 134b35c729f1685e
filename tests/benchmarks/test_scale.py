"""The benchmark of large exports: a run in two pieces gives every number, and leaves nothing behind."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
CALIBRATED = ["--wbits", "4", "--abits", "8", "--nsamples", "2", "--seqlen", "16"]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("scale")


@pytest.mark.slow
def test_a_run_in_pieces(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(scale, "write_result", lambda label, record: written.update(record))
    named = ["--like", "tiny", "--layers", "1", "--until", "onnx", "--", *CALIBRATED]
    monkeypatch.setattr("sys.argv", ["scale.py", str(tmp_path), *named])
    folder = tmp_path / "tiny-1"

    def stop(stage: str, out: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scale, "_alone", stop)
        scale.main()
    assert not (folder / "model").exists() and (folder / "out" / "quant").exists()

    def quantize(*arguments: Any) -> dict[str, Any]:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(scale.Depth, "_quant", quantize)
        scale.main()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-1.json"]
    assert written["command"] == f"python benchmarks/scale.py WORK {' '.join(named)}"
    (row,) = written["rows"]
    assert (row["layers"], row["pieces"], len(row["block_seconds"])) == (1, 1, 1)
    assert row["model_bytes"] > 0 and list(row["stages"]) == ["quant", "onnx"]
    keys = ("seconds", "peak_rss", "peak_without_files", "bytes")
    assert all(stage[key] > 0 for stage in row["stages"].values() for key in keys)
    assert row["stages"]["onnx"]["torch"] is False


def test_other_options_need_another_folder(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = ["--wbits", "4", "--abits", "8", "--method", "rtn"]
    scale.Depth(tmp_path, "tiny", 1, rounded)._save()
    with pytest.raises(SystemExit) as caught:
        scale.Depth(tmp_path, "tiny", 1, CALIBRATED)
    assert str(caught.value) == (
        f"{tmp_path / 'tiny-1.json'}: made with {rounded}: choose another WORK"
    )


def test_blocks_that_are_made_again_count_once(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of the code, which throws away what was calibrated with the old one."""
    depth = scale.Depth(tmp_path, "tiny", 3, CALIBRATED)
    (depth.folder / "model").mkdir(parents=True)
    (depth.folder / "out").mkdir()
    stages = {"quant": {"seconds": 1, "peak_rss": 2}}
    (depth.folder / "out" / "manifest.json").write_text(json.dumps({"stages": stages}))

    def piece(*notes: str) -> list[float]:
        def measured(command: list[str], follow: Callable[[str], None]) -> dict[str, Any]:
            line: dict[str, Any] = {"stage": "calibrate", "event": "start", "seconds": 0}
            follow(json.dumps(line))
            for number, note in enumerate(notes, 1):
                line |= {"event": "progress", "seconds": number**2, "note": note}
                follow(json.dumps(line))
            return {}

        monkeypatch.setattr(scale, "_measured", measured)
        depth._quant(depth.folder / "model", depth.folder / "out")
        return list(depth.record["block_seconds"])

    made = [f"block {number} of 3: loss 1 -> 2" for number in (1, 2, 3)]
    assert piece(*made[:2]) == [1, 3]
    assert piece("block 1 of 3: kept", "block 2 of 3: kept", made[2]) == [1, 3, 5]
    assert piece(*made) == [1, 3, 5]
    assert depth.record["pieces"] == 3
