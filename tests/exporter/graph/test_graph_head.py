"""A quantized head in the graph: one custom node with the final norm in it, in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.quant.bits import SchemeMap
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from calibration.reference.model import quantised_model
from exporter.graph.decoder import MODEL_FILE, export_onnx
from exporter.run.model import open_session
from exporter.run.onnxruntime import OnnxSession
from plugins.core.op_spec import is_custom
from tests.conftest import FAMILIES
from tests.exporter.graph_cases import Decoder, export, feeds

IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13]], np.int64)
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8 over w4a8": {"op": "QQQGemm", "head": 8},
    "w8a8 over w8a8": {"wbits": 8, "head": 8},  # one scheme for all
    "w4a8 g16": {"wbits": 2, "balanced": True, "abits": 4, "group_size": 16, "head": 4},
    "w6a16": {"wbits": 3, "abits": 16, "head": 6},
}


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def reference(folder: Path) -> np.ndarray:
    model = quantised_model(read_quant(folder.parent / "quant"))
    return np.asarray(model(torch.from_numpy(IDS)).logits.numpy())


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_equal_the_torch_reference(tiny_export: Callable[..., Path], name: str) -> None:
    folder = tiny_export(dtype="float32", **SCHEMES[name]) / "onnx"
    quant = read_quant(folder.parent / "quant")
    assert quant.head is not None and quant.head.label == name.partition(" over")[0].replace(
        " ", "-"
    )
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    want = reference(folder)
    assert logits.dtype == np.float32 and relative(logits, want) < 2e-3
    left = reference(tiny_export(dtype="float32", **SCHEMES[name] | {"head": 16}) / "onnx")
    assert relative(want, left) > 1e-3  # a float head gives others


@pytest.mark.parametrize("kind", ["native", "onnxruntime", "torch"])
def test_wanted_rows_of_every_session(tiny_export: Callable[..., Path], kind: str) -> None:
    out = tiny_export(dtype="float32", **SCHEMES["w8a8 over w4a8"])
    with open_session(kind, out) as session:
        some = session.step(IDS, np.ones_like(IDS), np.array([[10, 2]]))["logits"]
        assert relative(some, reference(out / "onnx")[:, [10, 2]]) < 2e-3


def test_structure(tiny_export: Callable[..., Path]) -> None:
    folder = tiny_export(**SCHEMES["w8a8 over w4a8"]) / "onnx"
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    *inner, head = [node for node in model.graph.node if is_custom(node.domain)]
    assert len(inner) == 8 and {node.op_type for node in inner} == {"QQQGemm"}
    assert (head.name, head.op_type) == ("lm_head", "ABQGemm")
    assert list(head.input) == [
        "lm_head.rows",
        "lm_head.weight",
        "lm_head.scale",
        "lm_head.zero",
        "model.norm.weight",
    ]
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in head.attribute}
    assert (attributes["out_features"], attributes["plugin_namespace"]) == (512, b"anybit")
    kinds = [node.op_type for node in model.graph.node]
    assert "RMSNorm" not in kinds and "MatMul" not in kinds
    codes, table = (
        next(item for item in model.graph.initializer if item.name == name)
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert codes.data_type == onnx.TensorProto.INT32 and list(codes.dims) == [8, 512, 4]
    assert table.data_type == onnx.TensorProto.FLOAT16 and list(table.dims) == [512, 64]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_apart_give_the_same_bits(tiny_export: Callable[..., Path], dtype: str) -> None:
    outputs = []
    for fused in (True, False):
        out = tiny_export(fuse_norms=fused, dtype=dtype, **SCHEMES["w8a8 over w8a8"])
        with OnnxSession(out / "onnx", 64) as session:
            outputs.append(session.run(IDS))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.usefixtures("more_families")
@pytest.mark.parametrize(
    ("name", "changes"), [("Gemma2", {"final_logit_softcapping": 0.2}), ("Qwen3", {})]
)
def test_other_families(
    tiny_llama: Callable[..., Path], tmp_path: Path, name: str, changes: dict[str, float]
) -> None:
    """A cap of the logits, a norm that stores its gain less 1, a head that was not tied."""
    base = QuantScheme("ABQGemm", "rtn", 8, 8, dtype="float32")
    model = tiny_llama(architecture=name, **{**FAMILIES[name], **changes})
    folder = export(model, SchemeMap(base, head_bits=8), tmp_path)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    want = reference(folder)
    assert relative(logits, want) < 2e-3
    if name == "Gemma2":
        assert 0.15 < np.abs(logits).max() < 0.2


def test_same_input_same_bytes(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_export(**SCHEMES["w8a8 over w4a8"]) / "onnx"
    facts = export_onnx(read_quant(folder.parent / "quant"), tmp_path)
    assert facts["summary"] == "8 QQQGemm and 1 ABQGemm nodes, opset 23"
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
