"""Report: the JSON holds what the stages and the validation found, and the page is written beside
it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.out.files import write_json
from exporter.proof.judge import LayerReport
from exporter.proof.result import ValidationResult
from exporter.report.report import environment, report_data, write_report
from tests.exporter.engine_cases import ENGINE

ROW = LayerReport(
    "export",
    "prefill",
    "model.layers.0.output",
    0.99,
    17.0,
    1.0,
    0.14,
    0.2,
    None,
    "model.layers.0.mlp.product",
    1e-3,
    4e-3,
)
RESULT = ValidationResult(
    (ROW,), "", ("No GPU here.",), {"tokens": 8, "steps": 0, "text": "default", "seconds": 1.5}
)
RECORD = {
    "fingerprint": "x",
    "seconds": 2.5,
    "peak_rss": 10**8,
    "files": {"a": {"bytes": 3, "sha256": ""}, "b": {"bytes": 4, "sha256": ""}},
}
MANIFEST = {
    "request": {"model": "tiny"},
    "command": ["python", "-m", "exporter", "my model"],
    "stages": {"quant": RECORD, "report": RECORD},
    "versions": {"torch": "2.13.0"},
    "perplexity": {"ppl": 9.5},
}


def test_data_is_gathered(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_export(), out)
    assert report_data(out, MANIFEST, RESULT)["engine"] is None
    (out / "engine").mkdir()
    write_json(out / "engine" / "engine.json", ENGINE)
    assert (
        report_data(out, MANIFEST, RESULT)["engine"] is None
    )  # the manifest says what belongs to this export, not the disk
    data = report_data(
        out, {**MANIFEST, "stages": {"quant": RECORD, "engine": RECORD, "report": RECORD}}, RESULT
    )
    assert (
        data["label"] == "w4a8" and data["scheme"]["op"] == "ABQGemm" and data["engine"] == ENGINE
    )
    assert data["stages"] == [
        {"name": name, "seconds": 2.5, "peak_rss": 10**8, "bytes": 7}
        for name in ("quant", "engine")
    ]
    assert data["command"] == "python -m exporter 'my model'" and data["perplexity"] == {"ppl": 9.5}
    assert data["quality"] is None and [command.split()[3] for command, _ in data["next"]] == [
        "generate",
        "eval",
        "prove",
        "trtexec",
    ]
    assert data["shape"]["num_hidden_layers"] == 2 and "hf" not in data["shape"]
    assert data["sizes"]["model_quant_bytes"] < data["sizes"]["model_float_bytes"]
    assert (
        data["validation"]["ok"] is True
        and data["validation"]["rows"][0]["operator"] == "model.layers.0.mlp.product"
    )


def test_a_model_that_loses_comes_with_the_command_that_says_where(
    tiny_export: Callable[..., Path],
) -> None:
    out = tiny_export()
    near = {"ppl": 10.5, "float_ppl": 10.0, "chance": 512, "kl": 0.05}
    for quality, asked in ((near, False), (near | {"kl": 0.2}, True), (near | {"ppl": 99.0}, True)):
        commands = report_data(out, {**MANIFEST, "quality": quality}, RESULT)["next"]
        wanted = (
            f"python -m deploy attribute {out} --minutes 10",
            "See which nodes cost the quality",
        )
        assert (wanted in commands) is asked


def test_a_failure_comes_with_the_command_that_looks_at_it(
    tiny_export: Callable[..., Path],
) -> None:
    out = tiny_export()
    bad = ValidationResult((replace(ROW, relative=0.5),), "got 0.5", (), RESULT.facts)
    assert report_data(out, MANIFEST, bad)["next"] == [
        (
            f"python -m deploy prove {out} --layers 0:1 --to {out}-proof",
            "Look at the first bad layer alone",
        )
    ]


def test_both_files_are_written(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    data = report_data(tiny_export(), MANIFEST, RESULT)
    write_report(tmp_path, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(data))
    page = (tmp_path / "index.html").read_text()
    assert (
        page.startswith("<!doctype html>")
        and str(tmp_path) not in page
        and "model.layers.0.mlp.product" in page
    )


@pytest.mark.parametrize(
    "found, words",
    [([], "no GPU"), (["9.0", "8.6"], "compute capability 9.0, compute capability 8.6")],
)
def test_environment_names_the_gpu(
    monkeypatch: pytest.MonkeyPatch, found: list[str], words: str
) -> None:
    monkeypatch.setattr("exporter.report.report.gpu_capabilities", lambda: found)
    machine = environment({"torch": "2.13.0"})
    assert machine["gpu"] == words and machine["cpu"] and machine["versions"] == {"torch": "2.13.0"}
