"""One table of several artifacts: the numbers of the benchmark, sizes, and every form of the table."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import quality
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.progress import NullProgress
from deploy.__main__ import main
from deploy.compare import CompareRequest, Row, compare, markdown, plot, table
from exporter.proof.perplexity import text_windows
from plugins.errors import InputError
from tests.conftest import FAMILIES

TEXT = Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt"
ROWS = [
    Row("float", "float16", "", 2_000_000, 16.0, 10.0, 1.0, 0.0),
    Row("out/a|b", "w4a8", "rtn", 600_000, 4.25, 12.5, 0.8, 0.1234),
    Row("out/c", "w2a8", "abq", 400_000, 2.25, 46950.0, 0.01, 7.5),
]


def test_numbers_are_those_of_all_models_at_once(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path
) -> None:
    outs = [tiny_quant(4, 8), tiny_quant(3, 8)]
    request = CompareRequest(outs=outs, text=TEXT, model=str(tiny_model_dir), first=2, seqlen=32)
    rows = compare(request, NullProgress())
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    windows = text_windows(checkpoint.tokenizer(), TEXT, 32, 512)[:2]
    totals = quality.score(quality.open_models(checkpoint, outs, []), windows)
    for row, (name, total) in zip(rows, totals.items(), strict=True):
        means = total.means(name)
        assert (row.perplexity, row.top1) == pytest.approx((means["ppl"], means["top1"]), rel=1e-5)
        assert row.kl == pytest.approx(means["kl"], rel=1e-4, abs=1e-12)
    assert [row.scheme for row in rows] == ["float16", "w4a8", "w3a8"]
    assert rows[0].bytes > rows[1].bytes > rows[2].bytes
    assert rows[0].bits_per_weight == 16 > rows[1].bits_per_weight > rows[2].bits_per_weight > 3


def test_longrope_turns_as_the_export_does_in_both_models(
    tiny_llama: Callable[..., Path], export: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {**FAMILIES["Phi3"], "sliding_window": None, "original_max_position_embeddings": 12}
    model = tiny_llama(architecture="Phi3", **changes)
    outs = [export(model, tmp_path / str(most), max_seq=most) for most in (12, 64)]
    checkpoint = open_checkpoint(str(model), offline=True)
    windows = text_windows(checkpoint.tokenizer(), TEXT, 10, 512)[:2]
    for out in outs:
        request = CompareRequest(outs=[out], text=TEXT, first=2, seqlen=10)
        row = compare(request, NullProgress())[1]
        totals = quality.score(quality.open_models(checkpoint, [out], []), windows)
        assert row.kl == pytest.approx(totals[out.name].means("")["kl"], rel=1e-4)
        assert 0 < row.kl < 0.01  # 8 bits; the other frequencies cost more than ten times as much
    with pytest.raises(InputError) as error:
        compare(CompareRequest(outs=outs, text=TEXT, first=2, seqlen=10), NullProgress())
    assert str(error.value) == (
        f"{outs[1]}: got an export for 64 tokens beside one for 12 ({outs[0]}), expected the same "
        "rotary frequencies in both, which longrope changes in between. Export both with the same "
        "--max-seq."
    )
    with pytest.raises(InputError) as error:
        compare(CompareRequest(outs=outs[:1], text=TEXT, seqlen=20), NullProgress())
    assert str(error.value) == (
        "--seqlen: got 20, expected at most 12, the context of the exports. Give less, or export "
        "with a larger --max-seq."
    )


def test_every_form_of_the_table(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"table.{name}" for name in ("csv", "markdown", "plot")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    short = ["--first", "1", "--seqlen", "16", "--progress", "none"]
    assert main(["compare", str(artifact), *short, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == (
        "on the project's own text, which calibration has seen unless --calib named another"
    )
    assert len(lines) == 3 and lines[1].startswith("float  ") and str(artifact) in lines[2]
    rows = list(csv.DictReader(files["csv"].open()))
    assert rows[1]["scheme"] == "w8a8" and float(rows[1]["perplexity"]) > 1
    assert files["markdown"].read_text().count("\n") == 4
    ElementTree.fromstring(files["plot"].read_text())


def test_tables_line_up() -> None:
    assert table(ROWS).splitlines() == [
        "         bits     method   MB  bits/weight  perplexity   top-1  KL, nats",
        "float    float16          2.0        16.00      10.000  100.0%    0.0000",
        "out/a|b  w4a8     rtn     0.6         4.25      12.500   80.0%    0.1234",
        "out/c    w2a8     abq     0.4         2.25  46,950.000    1.0%    7.5000",
    ]
    assert "| out/a\\|b | w4a8 | rtn | 0.6 | 4.25 |" in markdown(ROWS)


def test_the_plot_shows_smaller_to_the_left_and_better_below() -> None:
    svg = ElementTree.fromstring(plot(ROWS))
    space = "{http://www.w3.org/2000/svg}"
    good, bad = (
        (float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in svg.iter(f"{space}circle")
    )
    assert good[0] > bad[0] and good[1] > bad[1]
    words = "".join(svg.itertext())
    assert "a|b: 1 MB, 12.50" in words and "float, 10.00, 2 MB" in words
    assert plot(ROWS[:2]).count("<circle") == 1


def test_an_artifact_of_another_model(artifact: Path, tiny_llama: Callable[..., Path]) -> None:
    other = tiny_llama(rms_norm_eps=1e-6)
    with pytest.raises(InputError) as error:
        compare(CompareRequest(outs=[artifact], model=str(other)), NullProgress())
    assert str(error.value).startswith(
        f"{artifact}: got an artifact of another model (fingerprint "
    )
    with pytest.raises(InputError) as error:
        compare(CompareRequest(outs=[artifact / "none"]), NullProgress())
    assert str(artifact / "none") in str(error.value)


def test_an_artifact_that_names_no_model(tiny_quant: Callable[..., Path]) -> None:
    out = tiny_quant(4, 8)
    with pytest.raises(InputError) as error:
        compare(CompareRequest(outs=[out]), NullProgress())
    assert str(error.value) == (
        f"{out}: got an artifact that names no float model, expected one. Give it with --model."
    )
