"""A model whose nodes have different bits: its graph, its proof, its report, and that OUT knows its
bits file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from calibration.out.files import write_json
from calibration.out.json_file import read_json
from calibration.quant.folder import read_quant
from exporter.graph.decoder import export_onnx
from exporter.proof.options import ValidateOptions
from exporter.proof.result import ValidationResult
from exporter.proof.validate import validate
from exporter.report.html import page
from exporter.report.report import report_data
from plugins.core.op_spec import is_custom

Export = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
NODES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
LABELS = (
    ("w4a8", "w4a8", "w2ba8-g16", "w8a8"),
    ("w4a16", "w4a16", "w4a8", "w8a8"),
)  # of `mixed`, by layer


def test_every_node_has_its_own_op_and_attributes(
    tiny_export: Export, mixed: dict[str, Any]
) -> None:
    path = tiny_export(**mixed) / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node if is_custom(node.domain)}
    assert list(nodes) == [f"model.layers.{i}.{name}" for i in range(2) for name in NODES]
    found = {}
    for name, node in nodes.items():
        values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        found[name] = (
            node.op_type,
            *(values[key] for key in ("wbits", "levels", "abits", "act_symmetric", "group_size")),
        )
        assert values["plugin_namespace"] == b"anybit"
    qqq, two, eight, float16 = (
        ("QQQGemm", 4, 16, 8, 1, 0),
        ("ABQGemm", 2, 5, 8, 1, 16),
        ("ABQGemm", 8, 256, 8, 1, 0),
        ("ABQGemm", 4, 16, 16, 0, 0),
    )
    assert list(found.values()) == [qqq, qqq, two, eight, float16, float16, qqq, eight]
    assert sorted((item.domain, item.name) for item in model.functions) == [
        ("anybit", "ABQGemm"),
        ("anybit", "QQQGemm"),
        ("anybit.v1", "ABQGemm"),
        ("anybit.v1", "QQQGemm"),
        ("anybit.v2", "ABQGemm"),
        ("anybit.v3", "ABQGemm"),
        ("anybit_attention", "CachedAttention"),
        *(
            ("anybit_pointwise", op)
            for op in ("Activation", "RMSNorm", "ResidualSum", "RotatedHeads")
        ),
    ]  # a scheme with a norm and without one has two
    assert {item.key: item.value for item in model.metadata_props} == {
        "anybit.scheme": "w4a8-mixed",
        "anybit.method": "rtn",
    }


def test_the_summary_counts_each_op(
    tiny_quant: Export, mixed: dict[str, Any], tmp_path: Path
) -> None:
    facts = export_onnx(read_quant(tiny_quant(**mixed) / "quant"), tmp_path)
    assert facts == {"summary": "3 QQQGemm and 5 ABQGemm nodes, opset 23", "custom_nodes": 8}


@pytest.mark.parametrize(
    ("node", "change"),
    [
        ("model.layers.0.mlp.down_proj", {"act_symmetric": False}),
        ("model.layers.0.mlp.gate_up_proj", {"abits": 6}),
        ("model.layers.1.self_attn.qkv_proj", {"abits": 8}),
    ],
)
def test_a_node_exported_in_another_scheme_is_found(
    tiny_export: Export, mixed: dict[str, Any], tmp_path: Path, node: str, change: dict[str, Any]
) -> None:
    """The torch reference follows quant.json, so it must compute this node, and no other, by its
    own scheme.
    """
    out = shutil.copytree(tiny_export(**mixed), tmp_path / "out")
    meta = read_json(out / "quant" / "quant.json")
    meta["layers"][node] |= change
    write_json(out / "quant" / "quant.json", meta)
    result = validate(out, ValidateOptions(tokens=24, steps=0))
    assert re.search(
        rf" at {re.escape(node)}( \(with \w+\))? given its inputs \(export, prefill: ",
        result.first_failure,
    )


# ---------------------------------------------------------------- the report


def test_the_report_shows_every_nodes_bits(tiny_export: Export, mixed: dict[str, Any]) -> None:
    data = report_data(tiny_export(**mixed), {}, ValidationResult((), "", ()))
    assert data["label"] == "w4a8-mixed" and data["scheme"]["op"] == "QQQGemm"
    assert (data["mixed"]["exceptions"], data["mixed"]["nodes"]) == (5, 8)
    assert data["mixed"]["layers"] == [dict(zip(NODES, labels, strict=True)) for labels in LABELS]
    assert [
        (item["label"], item["op"], item["nodes"], item["weights"])
        for item in data["mixed"]["schemes"]
    ] == [
        ("w4a8", "QQQGemm", 3, 64 * 128 + 64 * 64 + 64 * 256),
        ("w2ba8-g16", "ABQGemm", 1, 64 * 256),
        ("w8a8", "ABQGemm", 2, 2 * 64 * 128),
        ("w4a16", "ABQGemm", 2, 64 * 128 + 64 * 64),
    ]
    text = page(json.loads(json.dumps(data)))
    bits = data["sizes"]["bits_per_weight"]
    assert (
        f"Mixed, {bits:.1f} bits per weight on average, scales included: 5 of 8 GEMM nodes "
        f"differ from 4-bit weights, "
        "8-bit activations, one scale per output channel; QQQGemm, method rtn."
    ) in text
    assert '<th scope="row">0</th><td>w4a8</td><td>w4a8</td><td>w2ba8-g16</td><td>w8a8</td>' in text
    assert (
        '<th scope="row">w4a16</th><td>ABQGemm</td><td>float16</td><td>2</td><td>0.01</td>' in text
    )
    assert "<dt>mixed precision</dt><dd>5 nodes differ from the following, see Bits</dd>" in text


def test_one_scheme_for_all_is_not_called_mixed(tiny_export: Export) -> None:
    data = report_data(tiny_export(), {}, ValidationResult((), "", ()))
    assert data["mixed"] is None and data["label"] == "w4a8"
    text = page(data)
    assert "Mixed" not in text and "mixed precision" not in text and "<h2>Bits</h2>" not in text


# ---------------------------------------------------------------- the command line


def test_out_belongs_to_one_bits_file(
    run: Run,
    refused: Callable[[tuple[int, str, str], str], None],
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, bytes]],
) -> None:
    out, bits = tmp_path / "out", tmp_path / "bits.txt"
    bits.write_text("down_proj w8a8\n")
    code, stdout, _ = run(out, "--bits-file", str(bits))
    assert code == 0 and "6 QQQGemm and 2 ABQGemm nodes" in stdout
    assert read_quant(out / "quant").label == "w4a8-mixed"
    before, end = snapshot(out), "Choose another --out, or delete this folder."
    found = 'scheme.rules [["down_proj", "w8a8"]]'
    refused(
        run(out, "--resume"),
        f"{out}: got an artifact with {found}, expected no scheme.rules. {end}",
    )
    bits.write_text("down_proj w6a8\n")
    refused(
        run(out, "--bits-file", str(bits), "--resume"),
        f"{out}: got an artifact with {found}, expected scheme.rules "
        f'[["down_proj", "w6a8"]]. {end}',
    )
    assert snapshot(out) == before
    same = tmp_path / "same.txt"
    same.write_text("# the same rule in another file\ndown_proj   w8a8\n")
    code, _, err = run(out, "--bits-file", str(same), "--resume")
    assert code == 0 and "quant: kept, nothing changed\nonnx: kept, nothing changed\n" in err


def test_bad_rules_are_refused_before_any_work(
    run: Run, refused: Callable[[tuple[int, str, str], str], None], tmp_path: Path
) -> None:
    out, bits = tmp_path / "out", tmp_path / "bits.txt"
    bits.write_text("layers.7.* w8a8\n")
    refused(
        run(out, "--bits-file", str(bits)),
        f"{bits}, line 1: got pattern 'layers.7.*', which matches none of this model's linears, "
        f"expected names as in "
        "model.layers.0.self_attn.qkv_proj, model.layers.0.self_attn.o_proj, "
        "model.layers.0.mlp.gate_up_proj, "
        "model.layers.0.mlp.down_proj; layers 0 to 1. Check the spelling and the layer.",
    )
    bits.write_text("q_proj w8a8\n")
    refused(
        run(out, "--bits-file", str(bits)),
        f"model.layers.0.self_attn.qkv_proj: got q_proj w8a8 ({bits}, line 1), k_proj w4a8 (the "
        f"base), v_proj w4a8 (the base); "
        "expected one scheme, because these linears are one GEMM node. Name qkv_proj or every "
        "linear of it.",
    )
    refused(
        run(out, "--bits-file", str(tmp_path / "none")),
        f"--bits-file: got No such file or directory for {tmp_path / 'none'}, expected a text "
        f"file. Check the path.",
    )
    assert not out.exists()


def test_a_budget_flows_to_the_graph_and_is_part_of_out(
    run: Run,
    refused: Callable[[tuple[int, str, str], str], None],
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, bytes]],
) -> None:
    out, data = tmp_path / "out", ("--nsamples", "4", "--seqlen", "64", "--method", "rtn")
    code, _, err = run(out, "--budget", "5.5", *data)
    quant, facts = (
        read_quant(out / "quant"),
        read_json(out / "manifest.json")["stages"]["onnx"]["facts"],
    )
    assert code == 0 and quant.label == "w4a8-mixed" and quant.sizes["bits_per_weight"] <= 5.5
    abq = sum(scheme.op == "ABQGemm" for scheme in quant.exceptions.values())
    assert abq == len(quant.exceptions) > 0 and f"{abq} ABQGemm" in facts["summary"]
    assert (
        f"; {abq} of 8 nodes differ from w4a8, which everywhere would be 4.444 bits per weight, "
        f"expected rise in loss 0.0" in err
    )
    assert (
        report_data(out, {}, ValidationResult((), "", ()))["sizes"]["bits_per_weight"]
        == quant.sizes["bits_per_weight"]
    )
    before, end = snapshot(out), "Choose another --out, or delete this folder."
    code, _, err = run(out, "--budget", "5.5", "--resume", *data)
    assert (
        code == 0
        and "budget: measured before, nothing changed\n" in err
        and "onnx: kept, nothing changed\n" in err
    )
    refused(
        run(out, "--resume", *data),
        f"{out}: got an artifact with budget 5.5, expected no budget. {end}",
    )
    refused(
        run(out, "--budget", "6", "--resume", *data),
        f"{out}: got an artifact with budget 5.5, expected budget 6.0. {end}",
    )
    assert snapshot(out) == before
    new = tmp_path / "new"
    refused(
        run(new, "--budget", "2", *data),
        "--budget: got 2 bits per weight, expected 2.89 to 8.89 for this model, scales and zero "
        "points included. Choose a budget in between.",
    )
    assert not new.exists()
