"""A KV cache of few bits in the graph: its numbers bit for bit, its node, its proof, its faults,
and that OUT knows its bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from calibration.out.description import read_description
from calibration.out.files import write_json
from calibration.out.json_file import read_json
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from calibration.reference.model import CacheQuantizer
from exporter.engine.build import custom_nodes
from exporter.graph.decoder import export_onnx
from exporter.graph.names import KINDS
from exporter.graph.nodes import NodeFactory
from exporter.proof.options import ValidateOptions
from exporter.proof.result import ValidationResult
from exporter.proof.validate import validate
from exporter.report.html import page
from exporter.report.report import report_data
from exporter.run.model import find_model
from exporter.run.native import NativeSession
from exporter.run.onnxruntime import OnnxSession
from exporter.run.reference import TorchSession
from exporter.run.rounding import round_every_op
from plugins.cached_attention import LOW_BIT_OP as LOW_BIT
from plugins.cached_attention import OP as ATTENTION
from plugins.cached_attention.body import AttentionForm
from plugins.cached_attention.codes import stored, stored_values
from plugins.errors import InputError
from plugins.tools.build import build_onnxruntime
from tests.exporter.graph_cases import export

Export = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
ELEMENT = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
HEADS, WIDTH = 2, 24


def cache_model(bits: int, dtype: str) -> onnx.ModelProto:
    """Two inputs in fp32 -> cast to dtype -> attention with a cache of few bits, which was empty."""
    kind, form = ELEMENT[dtype], AttentionForm(bits=bits)
    factory = NodeFactory(kind)
    nodes = [helper.make_node("Cast", [f"{name}32"], [name], to=kind) for name in ("key", "value")]
    nodes += factory.call(
        form, "attention", ["key", *form.inputs[1:]], form.outputs, scale=0.2, softcap=0.0
    )
    shape = ["B", HEADS, "S", WIDTH]
    rows = {part: form.row(part, WIDTH, kind) for part in form.parts}
    info = helper.make_tensor_value_info
    inputs = [
        *(info(f"{name}32", TensorProto.FLOAT, shape) for name in ("key", "value")),
        *(
            info(f"past_{part}", kind, ["B", HEADS, "P", width])
            for part, (kind, width) in rows.items()
        ),
        info("mask", TensorProto.BOOL, ["B", 1, "S", "T"]),
    ]
    outputs = [
        info(f"present_{part}", kind, ["B", HEADS, "T", width])
        for part, (kind, width) in rows.items()
    ]
    known = [info("model.layers.0.output", kind, ["B", "S", 1])]  # says the model's type
    graph = helper.make_graph(nodes, "cache", inputs, outputs, value_info=known)
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


@pytest.mark.parametrize("native", [False, True], ids=["body", "native"])
@pytest.mark.parametrize("dtype", ELEMENT)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_graphs_cache_is_the_references_bit_for_bit(
    bits: int, dtype: str, native: bool
) -> None:
    """What codes and scales stand for is what the torch reference computes with."""
    model = cache_model(bits, dtype)
    onnx.checker.check_model(model, full_check=True)
    if dtype == "bfloat16":  # of which ONNX Runtime has no attention
        round_every_op(model)
    options = onnxruntime.SessionOptions()
    if native:
        del model.functions[:]
        options.register_custom_ops_library(str(build_onnxruntime()))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    key, value = hard_rows(dtype, bits), hard_rows(dtype, 100 + bits)
    form = AttentionForm(bits=bits)
    empty = {
        f"past_{part}": np.zeros(
            (2, HEADS, 0, form.row(part, WIDTH, 0)[1]), np.int8 if part in KINDS else np.float32
        )
        for part in form.parts
    }
    mask = np.tril(np.ones((2, 1, 9, 9), bool))
    feeds = {"key32": key.numpy(), "value32": value.numpy(), "mask": mask, **empty}
    names = [f"present_{part}" for part in form.parts]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    for kind, expected, raw in zip(
        KINDS, CacheQuantizer(bits, dtype)(key, value), (key, value), strict=True
    ):
        codes, scales = found[f"present_{kind}"], found[f"present_{kind}_scale"]
        assert codes.nbytes * 8 == raw.numel() * bits
        got = stored_values(codes, scales, bits, np.dtype(NUMPY[dtype])).astype(np.float32)
        np.testing.assert_array_equal(got, expected.numpy())
        loud = np.isnan(got).all(-1)
        assert (
            loud.sum() == 3 and np.isfinite(got[~loud]).all()
        )  # a bad number stays loud in its row, and nowhere else
        assert np.abs(got[~loud] - raw.numpy()[~loud]).max() > 0
        ours = stored(raw.numpy(), bits)
        np.testing.assert_array_equal(codes[~loud], ours[0][~loud])
        np.testing.assert_array_equal(scales[~loud], ours[1][~loud])


# ---------------------------------------------------------------- the model's graph


def test_codes_and_scales_are_inputs_and_outputs(tiny_export: Export) -> None:
    path = tiny_export(kv_bits=4) / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(item.domain, item.name) for item in model.functions] == [
        ("anybit", "ABQGemm"),
        ("anybit.v1", "ABQGemm"),
        ("anybit_pointwise", "RotatedHeads"),
        ("anybit_attention", LOW_BIT),
        ("anybit_pointwise", "ResidualSum"),
        ("anybit_pointwise", "Activation"),
        ("anybit_pointwise", "RMSNorm"),
    ]
    nodes = [node for node in model.graph.node if node.op_type == LOW_BIT]
    parts = ("key", "value", "key_scale", "value_scale")
    for index, node in enumerate(nodes):
        prefix, past = f"model.layers.{index}.self_attn", f"past_key_values.{index}"
        assert list(node.input) == [
            *(f"{prefix}.{name}" for name in ("query", "key", "value")),
            *(f"{past}.{part}" for part in parts[:2]),
            "mask",
            *(f"{past}.{part}" for part in parts[2:]),
        ]
        assert list(node.output) == [
            f"{prefix}.context",
            *(f"present.{index}.{part}" for part in parts),
        ]
    assert len(nodes) == 2
    types = {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    assert types["past_key_values.1.value"] == (TensorProto.INT8, ["B", 2, "P", 8])
    assert types["present.1.value_scale"] == (TensorProto.FLOAT, ["B", 2, "T", 2])
    assert (
        set(custom_nodes(model).values()) == {"ABQGemm"} and len(custom_nodes(model)) == 8
    )  # no plugin is asked for
    assert {item.key: item.value for item in model.metadata_props}["anybit.scheme"] == "w4a8-kv4"


@pytest.mark.parametrize("static", [0, 40])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_what_a_cache_takes_is_what_model_json_says(
    tiny_export: Export, bits: int, static: int
) -> None:
    out = tiny_export(kv_bits=bits, static=static)
    cache = read_description(out / "onnx" / "model.json", "")[0].cache
    assert cache.token_bytes == {2: 96, 4: 128, 16: 256}[bits]
    assert cache.parts == (KINDS if bits == 16 else (*KINDS, "key_scale", "value_scale"))
    with find_model(out, "native").open() as session:
        assert isinstance(session, NativeSession) and session.cache_bytes == 0
        session.run(np.arange(9)[None])
        assert session.cache_bytes == cache.token_bytes * (static or 9)


def test_heads_that_do_not_fill_bytes_are_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_llama(head_dim=12)
    scheme = QuantScheme("ABQGemm", "rtn", 8, 8, kv_bits=4)
    with pytest.raises(InputError) as caught:
        export(model, scheme, tmp_path)
    assert str(caught.value) == (
        "--kv-bits: got heads of 12 numbers, expected a multiple of 8 for a cache of 4 bits. Leave "
        "out --kv-bits."
    )


def test_without_it_the_graph_is_as_it_was(tiny_export: Export) -> None:
    model = onnx.load(tiny_export() / "onnx" / "model.onnx", load_external_data=False)
    assert (
        {item.domain for item in model.opset_import}
        == {"", "anybit", "anybit.v1", "anybit_attention", "anybit_pointwise"}
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
        OnnxSession(out / "onnx", 256, dtype=quant.scheme.dtype) as ours,
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_the_other_kind_is_found(tiny_export: Export, tmp_path: Path, kind: str) -> None:
    out = shutil.copytree(tiny_export(kv_bits=8), tmp_path / "out")
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if f"present.1.{kind}" in node.output)
    which = KINDS.index(kind)
    node.input[1 + which] = node.input[2 - which]
    path.write_bytes(model.SerializeToString())
    result = validate(out, ValidateOptions(tokens=24, steps=0))
    assert f" at present.1.{kind} given its inputs (export, prefill: " in result.first_failure, (
        result.first_failure
    )


def test_wrong_keys_are_found_before_the_cache(tiny_export: Export, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_export(kv_bits=4), tmp_path / "out")
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.name == "model.layers.1.self_attn.heads")
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
