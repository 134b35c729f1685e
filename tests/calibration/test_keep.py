"""--keep and --requantize on the command lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calibration.__main__ import main
from calibration.quant.folder import read_quant
from exporter.__main__ import main as exporter_main
from tests.calibration.formats import written


@pytest.fixture(scope="module")
def source(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float16", num_hidden_layers=1)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "tiny-gptq"
    return written.gptq(source, folder, ordered=True, left_out=("o_proj",)).folder


def run(folder: Path, out: Path, *options: str, export: bool = False) -> int:
    command = exporter_main if export else main
    return command([str(folder), "--out", str(out), "--offline", "--progress", "none", *options])


def test_codes_are_kept_and_a_second_run_finds_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(made, out, "--keep", "--abits", "8") == 0
    quant = read_quant(out / "quant")
    assert (quant.scheme.label, quant.scheme.method) == ("w4a8-g32", "kept")
    assert run(made, out, "--keep", "--abits", "8") == 0
    assert run(made, out, "--keep") == 2  # of other activation bits
    assert "expected abits 16" in capfd.readouterr().err
    assert read_quant(out / "quant").scheme == quant.scheme  # and is whole
    monkeypatch.chdir(tmp_path)
    assert main([str(made), "--offline", "--progress", "none", "--keep"]) == 0
    assert (tmp_path / "out/tiny-gptq-w4a16-g32-kept/quant").is_dir()


def test_an_export_is_proven_and_says_what_its_float_model_is(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(made, out, "--keep", "--engine", "none", export=True) == 0
    report = json.loads((out / "report/report.json").read_text())
    assert report["calibration"] == {"kept": "gptq"} and report["validation"]["ok"]
    assert report["quality"]["codes"] == "gptq" and not report["quality"]["seen"]
    assert report["quality"]["kl"] < 1e-5
    coded, floats = report["mixed"]["schemes"]
    assert (coded["label"], coded["nodes"]) == ("w4a16-g32", 3)
    assert floats == {
        "label": "float16",
        "op": "MatMul",
        "abits": 16,
        "dtype": "float16",
        "nodes": 1,
        "weights": 64 * 64,
    }
    assert report["mixed"]["exceptions"] == 1
    assert report["mixed"]["layers"][0]["self_attn.o_proj"] == "float16"
    page = (out / "report/index.html").read_text()
    assert "The float model is the gptq checkpoint with its codes dequantized." in page
    assert "none: the codes are those of the gptq checkpoint" in page
    command = ["--keep", "--engine", "none", "--resume"]
    before = (out / "quant/quant.json").stat().st_mtime_ns
    assert run(made, out, *command, export=True) == 0
    assert (out / "quant/quant.json").stat().st_mtime_ns == before


def test_requantizing(made: Path, tmp_path: Path) -> None:
    options = ("--requantize", "--wbits", "8", "--abits", "8", "--method", "rtn")
    assert run(made, tmp_path / "out", *options) == 0
    assert read_quant(tmp_path / "out/quant").scheme.label == "w8a8"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ("--wbits", "4", "--abits", "8"),
            "{made}: got a checkpoint that is quantized already (gptq), expected --keep or "
            "--requantize. --keep exports its own codes as they are, which is the better of the two "
            "for 4 to 8 bits; --requantize rounds its weights again, with --wbits and --abits.",
        ),
        (
            ("--keep", "--method", "rtn"),
            "--method: got it beside --keep, which leaves the checkpoint's codes as they are, "
            "expected one of the two. Leave out --method, or give --requantize in the place of --keep.",
        ),
        (
            ("--keep", "--set", "rotation=none"),
            "--set: got it beside --keep, which leaves the checkpoint's codes as they are, expected "
            "one of the two. Leave out --set, or give --requantize in the place of --keep.",
        ),
        (
            ("--keep", "--calib", "text.txt"),
            "--calib: got it beside --keep, which leaves the checkpoint's codes as they are, expected "
            "one of the two. Leave out --calib, or give --requantize in the place of --keep.",
        ),
        (
            ("--keep", "--abits", "9"),
            "--abits: got 9, expected 2 to 8, or 16 for weight-only. Give one of these.",
        ),
        (
            ("--keep", "--format", "compressed-tensors"),
            "--format compressed-tensors: got model.layers.0.self_attn.qkv_proj with its input "
            "channels in an order of their own, expected them in order. Leave out --format.",
        ),
        (
            ("--abits", "8"),
            "--wbits: got none, expected bits, or --keep for a checkpoint that is quantized already. "
            "Give --wbits 4, for example.",
        ),
        (
            ("--wbits", "4"),
            "--abits: got none, expected bits, or --keep for a checkpoint that is quantized already. "
            "Give --abits 8, for example.",
        ),
    ],
)
@pytest.mark.parametrize("export", [False, True])
def test_refusals(
    made: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    problem: str,
    export: bool,
) -> None:
    assert run(made, tmp_path / "out", *options, export=export) == 2
    assert capfd.readouterr().err.strip() == problem.format(made=made)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_what_there_is(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = shutil.copytree(made, tmp_path / "model"), tmp_path / "out"
    assert run(folder, out, "--keep") == 0
    before = {path.name: path.read_bytes() for path in (out / "quant").iterdir()}
    path, name = folder / "model.safetensors", "model.layers.0.mlp.down_proj.scales"
    tensors = load_file(path)
    tensors[name][0, 1] = np.nan
    save_file(tensors, path)
    capfd.readouterr()
    assert run(folder, out, "--keep") == 2
    assert "got one of another model or config" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in (out / "quant").iterdir()} == before
    for export in (False, True):
        assert run(folder, tmp_path / "other", "--keep", export=export) == 2
        assert (
            capfd.readouterr()
            .err.strip()
            .endswith(
                f"{folder}, {name}: got nan at [0, 1] and 1 such in all, expected finite numbers other "
                "than 0. The checkpoint is damaged: download it again."
            )
        )
        assert not (tmp_path / "other/quant").exists()


def test_floats_have_nothing_to_keep(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for options in (("--keep",), ("--requantize", "--wbits", "4", "--abits", "8")):
        assert run(source, tmp_path / "out", *options) == 2
        assert capfd.readouterr().err.strip() == (
            f"{options[0]}: got a model of floats, {source}, expected a checkpoint that is quantized "
            "already. Leave it out and give --wbits and --abits."
        )
