"""The proof as a command: its table, its page, what it leaves alone, what it refuses, and who takes
part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.progress import NullProgress
from deploy.__main__ import main
from deploy.prove import prove_artifact, summary
from exporter.proof.judge import LayerReport
from exporter.proof.options import ValidateOptions
from exporter.proof.result import ValidationResult
from exporter.proof.validate import validate
from plugins.errors import CheckError, InputError
from tests.exporter.planted import change_tensor, renew_records

SHORT = ("--tokens", "12", "--progress", "none")
BRIEF = ValidateOptions(tokens=12, steps=1)


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(out)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in out.rglob("*")
        if path.is_file()
    }


def levels(result: ValidationResult) -> set[str]:
    return {row.level for row in result.rows}


def wrong_scale(array: np.ndarray) -> None:
    array[3] *= 1.5


def wrong_scales(array: np.ndarray) -> None:
    array *= 8


def test_a_whole_artifact_is_proven_and_left_alone(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, page = contents(artifact), tmp_path / "proof"
    assert main(["prove", str(artifact), *SHORT, "--to", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["level", "phase", "worst", "of", "error", "limit"]
    assert lines[-2:] == [
        f"Report: {page / 'index.html'}",
        "Proven: 63 tensors at 5 levels (weights, export, native, as run, quantisation) within "
        "tolerance.",
    ]
    assert contents(artifact) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["proof"]
    rows = json.loads((page / "report.json").read_text())["validation"]["rows"]
    assert len(rows) == 63 and (page / "index.html").is_file()
    assert main(["prove", str(artifact), *SHORT, "--to", str(page), "--layers", "1:2"]) == 0
    assert len(json.loads((page / "report.json").read_text())["validation"]["rows"]) < 63


def test_a_fault_is_exit_3_and_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensor(copy, "model.layers.1.self_attn.o_proj.scale", wrong_scale)
    assert main(["prove", str(copy), *SHORT]) == 3
    out, err = capsys.readouterr()
    assert re.search(
        r"^export +prefill +3  model.layers.1.self_attn.o_proj +0.5 .* 1 out of tol", out, re.M
    )
    assert err.startswith(f"proof of {copy}: got a relative error of 0.5 in output channel 3 at ")
    assert "model.layers.1.self_attn.o_proj given its inputs (export, prefill: " in err
    assert err.endswith("--to FOLDER writes the whole report.\n")


def test_only_these_layers_are_judged(copy: Path) -> None:
    change_tensor(copy, "model.layers.0.self_attn.o_proj.scale", wrong_scales)
    found = {
        layers: validate(copy, ValidateOptions(tokens=12, steps=0, layers=layers))
        for layers in ((0, 1), (1, 2))
    }
    assert " at model.layers.0.self_attn.o_proj given " in found[0, 1].first_failure
    assert found[1, 2].first_failure.startswith("got an accumulated relative error of ")
    tensors = {
        layers: {row.tensor for row in result.rows if row.level != "as run"}
        for layers, result in found.items()
    }
    assert tensors[0, 1] == {"model.layers.0.output"}
    assert tensors[1, 2] == {"model.layers.1.output", "logits"}


def test_layers_that_are_not_there(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        validate(artifact, ValidateOptions(layers=(1, 3)))
    assert str(error.value) == (
        "--layers: got 1:3, expected A:B with 0 <= A < B <= 2, the number of decoder layers. Give "
        "such numbers; B itself is left out."
    )


@pytest.mark.parametrize(
    ("runners", "expected"),
    [
        (("native",), {"weights", "native", "as run"}),
        (("onnxruntime", "torch"), {"weights", "export", "quantisation"}),
    ],
)
def test_who_takes_part(artifact: Path, runners: tuple[str, ...], expected: set[str]) -> None:
    result = prove_artifact(artifact, replace(BRIEF, runners=runners), None, NullProgress())
    assert result.ok and levels(result) == expected and not result.notes


def test_one_runner_is_no_comparison(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        validate(artifact, ValidateOptions(runners=("onnxruntime",)))
    assert str(error.value) == (
        "--runner: got onnxruntime alone, expected another one to compare it with. Add native, "
        "tensorrt or torch, separated by commas."
    )


def test_a_runner_that_was_asked_for_has_to_run(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as error:
        validate(artifact, ValidateOptions(runners=("tensorrt",)))
    assert str(error.value).startswith(
        f"{artifact}: got no engine folder, expected it for --runner tensorrt"
    )
    lost = InputError("g++", "got none, expected one", "Install it")
    monkeypatch.setattr("exporter.proof.onnx_levels.native_library", lambda say: lost)
    with pytest.raises(InputError) as error:
        validate(artifact, ValidateOptions(runners=("native",)))
    assert error.value is lost


def test_an_artifact_with_the_same_codes_is_judged(copy: Path, artifact: Path) -> None:
    options = replace(BRIEF, runners=("onnxruntime",), against=artifact)
    rows = [row for row in validate(copy, options).rows if row.level == "against"]
    assert len(rows) == 9 and all(row.relative == 0 and row.limit for row in rows)
    change_tensor(copy, "model.layers.0.mlp.down_proj.scale", wrong_scales)
    result = validate(copy, options)
    assert not result.ok and "at model.layers.0.output (against, prefill: " in result.first_failure


def test_an_artifact_with_other_codes_is_shown(
    artifact: Path, tmp_path: Path, run_export: Callable[..., Path]
) -> None:
    """A rotated model's residual stream and values are compared in the other's coordinates."""
    other = run_export(tmp_path / "other", "--method", "abq", "--wbits", "8")
    options = replace(BRIEF, runners=("onnxruntime",), against=other)
    result = validate(artifact, options)
    assert result.notes[-1] == (
        f"{other} holds other codes (w8a8), so its differences are shown and not judged."
    )
    rows = [row for row in result.rows if row.level == "against"]
    assert all(row.limit is None and 0 < (row.relative or 0) < 0.1 for row in rows)


def test_an_artifact_of_another_model(artifact: Path, copy: Path) -> None:
    meta = json.loads((copy / "quant" / "quant.json").read_text())
    meta["config"]["max_position_embeddings"] = 128
    meta["config"]["hf"]["max_position_embeddings"] = 128
    (copy / "quant" / "quant.json").write_text(json.dumps(meta))
    with pytest.raises(InputError) as error:
        validate(artifact, ValidateOptions(runners=("onnxruntime",), against=copy))
    assert str(error.value) == (
        f"--against {copy}: got a model with max_position_embeddings 128, expected 256 as in "
        f"{artifact}. Give an artifact of the same float model."
    )


def test_the_report_goes_beside_the_artifact(artifact: Path, tmp_path: Path) -> None:
    def refused(to: Path) -> str:
        with pytest.raises(InputError) as error:
            prove_artifact(artifact, BRIEF, to, NullProgress())
        return str(error.value)

    for to in (artifact, artifact / "report", artifact.parent):
        assert refused(to) == (
            f"--to {to}: got a folder in or around the artifact {artifact}, expected one beside "
            f"it. Choose another, such as --to {artifact}-proof."
        )
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(tmp_path) == (
        f"--to {tmp_path}: got a folder with other files in it (notes.txt), expected a new one, or "
        "one that this command wrote before. Choose another --to."
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_models_tokenizer(copy: Path) -> None:
    """One that belongs to quant/ and onnx/ by every record."""
    for stage in ("quant", "onnx"):
        path = copy / stage / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
        path.write_text(json.dumps(tokenizer))
    renew_records(copy)
    with pytest.raises(CheckError) as error:
        prove_artifact(copy, BRIEF, None, NullProgress())
    assert str(error.value).startswith(f"{copy / 'quant'}, tokenizer: got token ")
    assert str(error.value).endswith(
        " as the float model's tokenizer gives. It is another model's: quantize the model again."
    )


def test_what_has_no_limit_is_not_proven() -> None:
    row = LayerReport("export", "prefill", "logits", 1.0, 9.0, 1.0, 0.9, 1.0)
    free = replace(row, limit=None)
    assert summary([row, replace(row, level="native"), free, replace(free, level="against")]) == (
        "Proven: 2 tensors at 2 levels (export, native) within tolerance. 2 shown, not judged "
        "(against)."
    )
    inside = replace(free, operator="lm_head", operator_error=0.0, operator_limit=0.1)
    assert summary([inside, free]) == (
        "Proven: 1 tensors at 1 level (export) within tolerance. 1 shown, not judged."
    )
    assert summary([free]) == (
        "Nothing is proven: no error has a limit. 1 shown, not judged (export)."
    )


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("--runner", "native,cuda"): (
            "argument --runner: got 'cuda', expected some of torch,native,onnxruntime,tensorrt, "
            "separated by commas"
        ),
        ("--layers", "3"): (
            "argument --layers: got '3', expected A:B, the first layer and the one behind the last"
        ),
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["prove", "out", *arguments])
        assert stop.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(message)


@pytest.fixture
def run_export(tiny_model_dir: Path) -> Callable[..., Path]:
    """run_export(out, *options) -> OUT of the tiny model up to the ONNX file."""
    from exporter.__main__ import main as export
    from tests.conftest import FOUR_WINDOWS

    def make(out: Path, *options: str) -> Path:
        words = [str(tiny_model_dir), "--abits", "8", *FOUR_WINDOWS, *options, "--out", str(out)]
        assert export([*words, "--until", "onnx", "--offline", "--progress", "none"]) == 0
        return out

    return make
