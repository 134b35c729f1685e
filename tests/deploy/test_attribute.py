"""python -m deploy attribute: its table, its record and page in OUT, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.out.files import file_records, verify_files, write_json
from calibration.out.json_file import read_json
from deploy.__main__ import main
from deploy.attribute import show_in_report, text
from exporter.proof.attribution import Attribution, Means
from exporter.report.report import write_report
from tests.exporter.report.test_report import MANIFEST, RESULT, report_data

SHORT = ("--first", "2", "--seqlen", "16", "--progress", "none")
FOUND = Attribution(
    text="a text",
    windows=2,
    seqlen=16,
    float_ppl=10.0,
    found=Means(0.5, 16.0, 0.7),
    parts={"everything": Means(0.0, 10.0, 1.0)},
    layers=[(0, 0, Means(0.1, 11.0, 0.9)), (1, 1, Means(0.45, 15.0, 0.7))],
    nodes={"model.layers.0.mlp.down_proj": Means(0.2, 12.0, 0.8)},
    nodes_left=7,
    finished=True,
    plan=None,
)


def test_a_table_and_lines(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", str(copy), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("KL ") and lines[3].startswith("everything  ")
    assert lines[-1] == (
        "on the project's own text, which calibration has seen unless --calib named another"
    )
    record = copy / "attribution.json"
    assert "as it is" in read_json(record)["measured"] and not (copy / "report").exists()
    before = record.read_bytes()
    assert main(["attribute", str(copy), *SHORT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert record.read_bytes() == before and found["windows"] == 2
    # A new report of the same codes shows it; one of others, or with a damaged record, does not.
    assert report_data(copy, MANIFEST, RESULT)["attribution"] == found
    write_json(record, read_json(record) | {"quant": "another"})
    assert report_data(copy, MANIFEST, RESULT)["attribution"] is None
    record.write_text("{")
    assert report_data(copy, MANIFEST, RESULT)["attribution"] is None
    assert f"perplexity {found['found']['ppl']:.3f}" in lines[0]


def test_ranges_that_were_not_looked_into_are_ranked_by_layer() -> None:
    assert FOUND.unopened() == [("layer 1", pytest.approx(0.05))]
    lines = text(Path("out"), FOUND).splitlines()
    assert f"{'layer 1':40}  +0.0500      0.4500" in lines
    assert not any(line.startswith("layer 0") for line in lines)
    kinds = [(0, 3, 0.1), (0, 1, 0.3), (2, 3, 0.35), (2, 2, 0.38)]
    ranges = [(first, last, Means(kl, 11.0, 0.9)) for first, last, kl in kinds]
    found = replace(FOUND, layers=ranges, nodes={})
    assert [name for name, _ in found.unopened()] == ["layer 2", "layers 0 to 1"]


def test_the_report_shows_it(copy: Path) -> None:
    assert not show_in_report(copy, FOUND)  # there is none
    (copy / "report").mkdir()
    write_report(copy / "report", report_data(copy, MANIFEST, RESULT))
    manifest = read_json(copy / "manifest.json")
    manifest["stages"]["report"] = {
        **manifest["stages"]["onnx"],
        "files": file_records(copy / "report"),
    }
    write_json(copy / "manifest.json", manifest)
    assert show_in_report(copy, FOUND)
    page = (copy / "report" / "index.html").read_text()
    assert "What each node costs" in page and "+0.3000" in page
    files = read_json(copy / "manifest.json")["stages"]["report"]["files"]
    assert files.keys() == {"index.html", "report.json"}
    verify_files(copy / "report", files)


def test_what_it_refuses(
    copy: Path, tiny_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_llama(rms_norm_eps=1e-6)
    assert main(["attribute", str(copy), *SHORT, "--model", str(other)]) == 2
    assert f"{copy}: got an artifact of another model (fingerprint " in capsys.readouterr().err
    for out, got in (
        (copy / "none", "no such folder"),
        (copy / "onnx", "a folder without quant/"),
        (copy / "manifest.json", "a file"),
    ):
        assert main(["attribute", str(out), *SHORT]) == 2
        assert capsys.readouterr().err == (
            f"{out}: got {got}, expected an artifact folder with quant/. Give the whole OUT of python -m "
            "exporter or python -m calibration.\n"
        )
    assert not (copy / "report").exists()
    with pytest.raises(SystemExit) as error:
        main(["attribute", str(copy), "--minutes", "-1"])
    assert error.value.code == 2 and "got -1, expected" in capsys.readouterr().err
