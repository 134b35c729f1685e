"""A KV cache of few bits in the graph: its numbers bit for bit, its node, its proof, its faults,
and that OUT knows its bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from calibration.out.files import write_json
from calibration.out.json_file import read_json
from calibration.quant.folder import read_quant
from calibration.reference.model import CacheQuantizer
from exporter.engine.build import custom_nodes
from exporter.graph.decoder import export_onnx
from exporter.graph.names import KINDS
from exporter.graph.nodes import CACHE_DOMAIN, NodeFactory
from exporter.proof.validate import ValidateOptions, ValidationResult, validate
from exporter.report.html import page
from exporter.report.report import report_data
from exporter.run.onnxruntime import OnnxSession
from exporter.run.reference import TorchSession
from plugins.cached_attention import OP as ATTENTION

Export = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
ELEMENT = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
}
HEADS, WIDTH = 2, 24


def cache_model(bits: int, dtype: str) -> onnx.ModelProto:
    """Two inputs in fp32 -> cast to dtype -> the cache's node -> cast to fp32."""
    factory = NodeFactory(ELEMENT[dtype])
    nodes = [
        helper.make_node("Cast", [f"{name}32"], [name], to=ELEMENT[dtype])
        for name in ("key", "value")
    ]
    nodes.append(factory.cache(bits, WIDTH, "cache", ["key", "value"], ["kept_key", "kept_value"]))
    nodes += [
        helper.make_node("Cast", [f"kept_{name}"], [f"{name}_out"], to=TensorProto.FLOAT)
        for name in ("key", "value")
    ]
    shape = ["B", HEADS, "S", WIDTH]
    inputs, outputs = (
        [
            helper.make_tensor_value_info(f"{name}{end}", TensorProto.FLOAT, shape)
            for name in ("key", "value")
        ]
        for end in ("32", "_out")
    )
    graph = helper.make_graph(nodes, "cache", inputs, outputs)
    return helper.make_model(
        graph, ir_version=11, functions=factory.functions(), opset_imports=factory.opset_imports(23)
    )


def hard_rows(dtype: str, seed: int) -> torch.Tensor:
    """[2, HEADS, 9, WIDTH] of a type: usual rows, outliers, one sign, ties, zeros, subnormals, the
    largest numbers, NaN and inf.
    """
    x = torch.randn(2, HEADS, 9, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0] = 0
    x[0, 0, 1] *= 2.0**-20
    x[0, 0, 2] = x[0, 0, 2].abs()
    x[0, 0, 3] = -x[0, 0, 3].abs()
    x[0, 0, 4, 5] = 4e4
    x[0, 0, 5] = torch.arange(WIDTH) - 11.5
    x[0, 0, 6, :2] = torch.tensor([65504.0, -20000.0])
    x[0, 1, 7, 3], x[1, 0, 8, 0], x[1, 1, 8, 7] = torch.nan, torch.inf, -torch.inf
    return x.to(getattr(torch, dtype)).float()


@pytest.mark.parametrize("dtype", ELEMENT)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_graphs_cache_is_the_references_bit_for_bit(bits: int, dtype: str) -> None:
    model = cache_model(bits, dtype)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    key, value = hard_rows(dtype, bits), hard_rows(dtype, 100 + bits)
    found = session.run(None, {"key32": key.numpy(), "value32": value.numpy()})
    for got, expected, raw in zip(
        found, CacheQuantizer(bits, dtype)(key, value), (key, value), strict=True
    ):
        np.testing.assert_array_equal(got, expected.numpy())
        loud = np.isnan(got).all(-1)
        assert (
            loud.sum() == 3 and np.isfinite(got[~loud]).all()
        )  # a bad number stays loud in its row, and nowhere else
        assert np.abs(got[~loud] - raw.numpy()[~loud]).max() > 0


# ---------------------------------------------------------------- the model's graph


def test_one_function_and_one_node_a_layer(tiny_export: Export) -> None:
    path = tiny_export(kv_bits=4) / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == CACHE_DOMAIN]
    assert [(node.name, list(node.input), list(node.output)) for node in nodes] == [
        (
            f"{prefix}.cache",
            [f"{prefix}.key", f"{prefix}.value"],
            [f"{prefix}.cached_key", f"{prefix}.cached_value"],
        )
        for prefix in (f"model.layers.{i}.self_attn" for i in range(2))
    ]
    assert [(item.domain, item.name) for item in model.functions] == [
        ("anybit", "ABQGemm"),
        ("anybit.v1", "ABQGemm"),
        ("anybit_attention", "CachedAttention"),
        (CACHE_DOMAIN, "QuantizeCache"),
    ]
    joined = [list(node.input[1:3]) for node in model.graph.node if node.op_type == ATTENTION]
    assert joined == [
        [f"model.layers.{i}.self_attn.cached_{kind}" for kind in ("key", "value")] for i in range(2)
    ]
    assert (
        set(custom_nodes(model).values()) == {"ABQGemm"} and len(custom_nodes(model)) == 8
    )  # no plugin is asked for
    assert {item.key: item.value for item in model.metadata_props}["anybit.scheme"] == "w4a8-kv4"


def test_without_it_the_graph_is_as_it_was(tiny_export: Export) -> None:
    model = onnx.load(tiny_export() / "onnx" / "model.onnx", load_external_data=False)
    assert (
        {item.domain for item in model.opset_import}
        == {"", "anybit", "anybit.v1", "anybit_attention"}
        == {node.domain for node in model.graph.node}
    )
    node = next(node for node in model.graph.node if node.op_type == ATTENTION)
    assert list(node.input[1:3]) == [f"model.layers.0.self_attn.{kind}" for kind in KINDS]


def test_the_summary_counts_custom_nodes_alone(tiny_quant: Export, tmp_path: Path) -> None:
    facts = export_onnx(read_quant(tiny_quant(kv_bits=4) / "quant"), tmp_path)
    assert facts == {"summary": "8 ABQGemm nodes, opset 23", "custom_nodes": 8}


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_bits": 4},
        {"kv_bits": 8, "op": "QQQGemm"},
        {"kv_bits": 3, "dtype": "bfloat16", "wbits": 8},
    ],
    ids=str,
)
def test_onnx_runtime_and_torch_decode_the_same(
    tiny_export: Export, fields: dict[str, Any]
) -> None:
    from calibration.reference.model import quantised_model

    out = tiny_export(**fields)
    quant = read_quant(out / "quant")
    ids, mask = np.arange(40).reshape(2, 20) * 11 % 512, np.ones((2, 20), np.int64)
    mask[0, :4] = 0
    with (
        OnnxSession(out / "onnx", quant.config["max_position_embeddings"]) as ours,
        TorchSession(quantised_model(quant)) as reference,
    ):
        for start, end in ((0, 15), (15, 16), (16, 20)):
            found, wanted = (
                session.step(ids[:, start:end], mask[:, :end]) for session in (ours, reference)
            )
            for name in (
                "present.0.key",
                "present.0.value",
                "present.1.key",
                "present.1.value",
                "logits",
            ):
                got, expected = found[name].astype(np.float32), wanted[name]
                axis = 1 if name == "logits" else 2
                got, expected = (
                    np.moveaxis(array, axis, 1)[1] for array in (got, expected)
                )  # the other row begins with padding
                assert got.shape == expected.shape
                assert np.linalg.norm(got - expected) <= 1e-3 * np.linalg.norm(expected), name
            for row in found["present.1.key"].astype(np.float32).reshape(-1, 16):
                assert len(np.unique(row)) <= 1 << quant.scheme.kv_bits


# ---------------------------------------------------------------- its proof


def test_another_width_than_quant_json_says_is_found_at_the_cache(
    tiny_export: Export, tmp_path: Path
) -> None:
    """The torch reference follows quant.json."""
    for bits, other in ((4, 5), (8, 7)):
        out = shutil.copytree(tiny_export(kv_bits=bits, dtype="bfloat16"), tmp_path / str(bits))
        meta = read_json(out / "quant" / "quant.json")
        meta["scheme"]["kv_bits"] = other
        write_json(out / "quant" / "quant.json", meta)
        result = validate(out, ValidateOptions(tokens=24, steps=0))
        assert " at present.0.key given its inputs (export, prefill: " in result.first_failure, (
            result.first_failure
        )


@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_cache_that_is_not_quantised_is_found(
    tiny_export: Export, tmp_path: Path, kind: str
) -> None:
    out = shutil.copytree(tiny_export(kv_bits=8), tmp_path / "out")
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if f"present.1.{kind}" in node.output)
    node.input[1 + KINDS.index(kind)] = f"model.layers.1.self_attn.{kind}"
    path.write_bytes(model.SerializeToString())
    result = validate(out, ValidateOptions(tokens=24, steps=0))
    assert f" at present.1.{kind} given its inputs (export, prefill: " in result.first_failure, (
        result.first_failure
    )


def test_wrong_keys_are_found_before_the_cache(tiny_export: Export, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_export(kv_bits=4), tmp_path / "out")
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(
        node for node in model.graph.node if node.output[0] == "model.layers.1.self_attn.qk_rotated"
    )
    node.input[1], node.input[2] = node.input[2], node.input[1]
    path.write_bytes(model.SerializeToString())
    result = validate(out, ValidateOptions(tokens=24, steps=0))
    assert (
        " at model.layers.1.self_attn.key given its inputs (export, prefill: "
        in result.first_failure
    ), result.first_failure


def test_the_report_shows_it(tiny_export: Export) -> None:
    data = report_data(tiny_export(kv_bits=4), {}, ValidationResult((), "", ()))
    assert data["label"] == "w4a8-kv4" and data["scheme"]["kv_bits"] == 4
    text = page(json.loads(json.dumps(data)))
    assert (
        "4-bit weights, 8-bit activations, one scale per output channel, 4-bit KV cache; "
        "ABQGemm, method rtn." in text
    )


# ---------------------------------------------------------------- the command line


def test_out_belongs_to_its_cache(
    run: Run, refused: Callable[[tuple[int, str, str], str], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run(out, "--kv-bits", "4")
    assert code == 0 and "8 QQQGemm nodes" in stdout
    assert read_quant(out / "quant").label == "w4a8-kv4"
    refused(
        run(out, "--resume"),
        f"{out}: got an artifact with scheme.kv_bits 4, expected scheme.kv_bits 16. "
        "Choose another --out, or delete this folder.",
    )
    code, _, err = run(out, "--kv-bits", "4", "--resume")
    assert code == 0 and "quant: kept, nothing changed\nonnx: kept, nothing changed\n" in err


def test_a_width_that_does_not_exist_is_refused_before_any_work(
    run: Run, refused: Callable[[tuple[int, str, str], str], None], tmp_path: Path
) -> None:
    refused(
        run(tmp_path / "out", "--kv-bits", "1"),
        "--kv-bits: got 1, expected 2 to 8, or 16 for a KV cache in floating point. Give one of these.",
    )
    assert not (tmp_path / "out").exists()
