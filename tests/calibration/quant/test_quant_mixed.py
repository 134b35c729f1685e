"""A quant folder of mixed bits: every linear in its node's scheme, true sizes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.__main__ import main
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods.rtn import quantize
from calibration.quant.bits import Rule, SchemeMap
from calibration.quant.checks import check_scheme
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from plugins.errors import InputError
from tests.conftest import W4A8

QQQ = QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True)
EIGHT = QuantScheme("ABQGemm", "rtn", 8, 8, act_symmetric=True)
TWO = QuantScheme("ABQGemm", "rtn", 2, 8, True, 16, True)
A16 = QuantScheme("ABQGemm", "rtn", 4, 16)
EXCEPTIONS = {
    "model.layers.0.mlp.gate_up_proj": TWO,
    "model.layers.0.mlp.down_proj": EIGHT,
    "model.layers.1.self_attn.qkv_proj": A16,
    "model.layers.1.self_attn.o_proj": A16,
    "model.layers.1.mlp.down_proj": EIGHT,
}
AGAIN = "The folder is damaged: quantise the model again."


def test_the_folder_gives_every_node_its_scheme(
    tiny_quant: Callable[..., Path], mixed: dict[str, Any], tiny_model_dir: Path
) -> None:
    quant = read_quant(tiny_quant(**mixed) / "quant")
    meta = json.loads((quant.path / "quant.json").read_text())
    assert meta["format"] == 1 and meta["scheme"] == QQQ.as_dict()
    assert meta["layers"] == {node: scheme.as_dict() for node, scheme in EXCEPTIONS.items()}
    assert (quant.scheme, quant.exceptions, quant.schemes, quant.label) == (
        QQQ,
        EXCEPTIONS,
        (QQQ, TWO, EIGHT, A16),
        "w4a8-mixed",
    )
    checkpoint = open_checkpoint(str(tiny_model_dir), True)
    for layer in range(2):
        for group in quant.groups(layer):
            scheme = EXCEPTIONS.get(group.name, QQQ)
            assert group.scheme == quant.scheme_of(group.name) == scheme
            parts = []
            for name in quant.decoder.members(group.name):
                arrays = quantize(checkpoint.array(f"{name}.weight"), None, scheme)
                assert quant.linear(name).scheme == quant.scheme_of(name) == scheme
                np.testing.assert_array_equal(quant.linear(name).arrays.codes, arrays.codes)
                np.testing.assert_array_equal(quant.linear(name).arrays.scale, arrays.scale)
                parts.append(quant.linear(name).dequantize())
            np.testing.assert_array_equal(group.dequantize(), np.concatenate(parts))


def test_sizes_count_each_linears_own_bits(
    tiny_quant: Callable[..., Path], mixed: dict[str, Any]
) -> None:
    quant = read_quant(tiny_quant(**mixed) / "quant")
    qkv, out, gate_up, down = 128 * 64, 64 * 64, 256 * 64, 64 * 128
    assert quant.weights() == {
        QQQ: qkv + out + gate_up,
        TWO: gate_up,
        EIGHT: 2 * down,
        A16: qkv + out,
    }
    codes = 4 * (qkv + out + gate_up) + 3 * gate_up + 8 * 2 * down + 4 * (qkv + out)
    scales = (
        32 * (128 + 64 + 256) + 64 * 256 * 4 + 64 * 2 * 64 + 64 * (128 + 64)
    )  # QQQ has no zero points
    assert quant.sizes["linear_quant_bits"] == codes + scales
    assert quant.sizes["bits_per_weight"] == round(
        (codes + scales) / (2 * (qkv + out + gate_up + down)), 4
    )


def test_one_scheme_leaves_the_folder_as_it_was(tiny_quant: Callable[..., Path]) -> None:
    quant = read_quant(tiny_quant(op="QQQGemm") / "quant")
    assert "layers" not in json.loads((quant.path / "quant.json").read_text())
    assert quant.exceptions == {} and quant.schemes == (QQQ,) and quant.label == "w4a8"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "{path}, layers: got 3, expected an object. " + AGAIN),
        (
            {"model.layers.2.mlp.down_proj": EIGHT.as_dict()},
            "{path}, layers: got model.layers.2.mlp.down_proj, expected GEMM nodes such as "
            "model.layers.0.self_attn.qkv_proj. " + AGAIN,
        ),
        (
            {"model.layers.1.mlp.up_proj": EIGHT.as_dict()},
            "{path}, layers: got model.layers.1.mlp.up_proj, expected GEMM nodes such as "
            "model.layers.0.self_attn.qkv_proj. " + AGAIN,
        ),
        (
            {"model.layers.1.mlp.down_proj": {"wbits": 8}},
            "{path}, layers, model.layers.1.mlp.down_proj: got no op, expected a whole record. "
            + AGAIN,
        ),
        (
            {"model.layers.1.mlp.down_proj": 8},
            "{path}, layers, model.layers.1.mlp.down_proj: got 8, expected an object. " + AGAIN,
        ),
        (
            {"model.layers.1.mlp.down_proj": {**EIGHT.as_dict(), "dtype": "float32"}},
            "{path}, layers, model.layers.1.mlp.down_proj: got dtype float32, expected the "
            "model's float16. " + AGAIN,
        ),
    ],
)
def test_damaged_layers(
    tiny_quant: Callable[..., Path], tmp_path: Path, layers: Any, message: str
) -> None:
    folder = shutil.copytree(tiny_quant() / "quant", tmp_path / "quant")
    path = folder / "quant.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": layers}))
    with pytest.raises(InputError) as caught:
        read_quant(folder)
    assert str(caught.value) == message.format(path=path)


def test_damaged_floats(tiny_quant: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_quant() / "quant", tmp_path / "quant")
    path, nodes = folder / "quant.json", read_quant(folder).decoder.nodes

    def why(floats: list[str]) -> str:
        path.write_text(json.dumps({**json.loads(path.read_text()), "floats": floats}))
        with pytest.raises(InputError) as caught:
            read_quant(folder)
        return str(caught.value)

    assert why(["model.layers.1.mlp.up_proj"]) == (
        f"{path}, floats: got model.layers.1.mlp.up_proj, expected GEMM nodes such as {nodes[0]}. {AGAIN}"
    )
    assert why([*nodes]) == (
        f"{path}, floats: got every GEMM node, expected some with codes. {AGAIN}"
    )
    assert why([nodes[-1]]) == (
        f"{folder}: got a tensor model.layers.1.mlp.down_proj.codes, expected no such from the config. "
        f"{AGAIN}"
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("o_proj", "w8a8-g128"),
            "w8a8-g128 for model.layers.0.self_attn.o_proj: got 128, which does not divide the "
            "in_features 64 of the "
            "linear layers it is for. Use -g0 (one scale per output channel) or 16, 32, 64.",
        ),
        (
            Rule("down_proj", "w8a8-g8"),
            "w8a8-g8 for model.layers.0.mlp.down_proj: got 8, expected 0 or at least 16. "
            "Use -g0 (one scale per output channel) or 16, 32, 64, 128.",
        ),
    ],
)
def test_a_rule_that_does_not_fit_its_linears(
    tiny_model_dir: Path, rule: Rule, message: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), True)
    with pytest.raises(InputError) as caught:
        check_scheme(checkpoint, SchemeMap(QQQ, (rule,)))
    assert str(caught.value) == message
    check_scheme(checkpoint, SchemeMap(QQQ, (Rule("down_proj", "w8a8-g128"),)))  # 128 divides these


def test_a_base_that_no_linear_has_need_not_fit(tiny_model_dir: Path) -> None:
    base = QuantScheme("ABQGemm", "rtn", 4, 8, group_size=48)
    check_scheme(
        open_checkpoint(str(tiny_model_dir), True), SchemeMap(base, (Rule("*", "w4a8-g16"),))
    )


def test_a_folder_of_other_bits_is_refused_and_kept(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bits = tmp_path / "out", tmp_path / "bits.txt"
    command = [
        str(tiny_model_dir),
        *W4A8,
        "--method",
        "rtn",
        "--out",
        str(out),
        "--progress",
        "none",
        "--offline",
    ]
    bits.write_text("layers.1.mlp.down_proj w8a8\n")
    assert main([*command, "--bits-file", str(bits)]) == 0
    before, fix = (
        (out / "quant" / "quant.json").read_bytes(),
        "Choose another --out, or delete this folder.",
    )
    assert main([*command, "--bits-file", str(bits)]) == 0  # the same again may replace it
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"{out / 'quant'}: got a model quantised with op ABQGemm, wbits 8 in "
        f"model.layers.1.mlp.down_proj, "
        f"expected op QQQGemm, wbits 4. {fix}\n"
    )
    bits.write_text("layers.1.mlp.down_proj w8a8\nlayers.0.mlp.down_proj w8a8\n")
    assert main([*command, "--bits-file", str(bits)]) == 2
    assert capsys.readouterr().err == (
        f"{out / 'quant'}: got a model quantised with op QQQGemm, wbits 4 in "
        f"model.layers.0.mlp.down_proj, "
        f"expected op ABQGemm, wbits 8. {fix}\n"
    )
    assert (out / "quant" / "quant.json").read_bytes() == before
