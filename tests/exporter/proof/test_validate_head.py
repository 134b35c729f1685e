"""A quantized head is proven like every other node: its weights, the node itself, all together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporter.proof.options import ValidateOptions
from exporter.proof.result import ValidationResult
from exporter.proof.runners import gemm_nodes
from exporter.proof.validate import validate
from plugins.errors import CheckError
from tests.exporter.proof.test_validate_faults import change

HEAD = "lm_head (with norm)"


def proof(out: Path, model: Path | None = None) -> ValidationResult:
    return validate(out, ValidateOptions(model=model and str(model), tokens=12, steps=2))


def test_every_level_has_the_head(tiny_export: Callable[..., Path], tiny_model_dir: Path) -> None:
    result = proof(tiny_export(head=8), tiny_model_dir)
    assert result.ok, result.first_failure
    weights = [row for row in result.rows if row.level == "weights" and row.tensor == "lm_head"]
    assert len(weights) == 1 and weights[0].limit is not None and weights[0].relative is not None
    assert 0.001 < weights[0].relative < weights[0].limit < 0.02
    ends = [row for row in result.rows if row.tensor == "logits"]
    assert {row.level for row in ends} == {"export", "native", "as run", "quantisation"}
    operators = {row.operator for row in ends if row.level == "export"}
    assert operators <= {HEAD, "logits"}


@pytest.mark.parametrize("norms", [True, False])
def test_a_fault_in_the_head(tiny_export: Callable[..., Path], tmp_path: Path, norms: bool) -> None:
    out = Path(shutil.copytree(tiny_export(norms, head=8), tmp_path / "out"))
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    data = out / "onnx" / "model.onnx.data"
    change(model, data, "lm_head.scale", 7, lambda value: value * 1.5)
    found = proof(out).first_failure
    name = HEAD if norms else "lm_head"
    assert f" in output channel 7 at {name} given its inputs (export, prefill: " in found


def test_a_missing_head(tiny_export: Callable[..., Path]) -> None:
    from calibration.quant.folder import read_quant

    out = tiny_export(head=8)
    quant = read_quant(out / "quant")
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.name == "lm_head")
    model.graph.node.remove(node)
    with pytest.raises(CheckError) as caught:
        gemm_nodes(model, quant.decoder)
    assert str(caught.value) == (
        "model.onnx: got 8 custom nodes without lm_head, expected 9: 4 in each of 2 decoder layers "
        "and the head. The graph was changed after its export (inlined functions?): export the "
        "model again."
    )
