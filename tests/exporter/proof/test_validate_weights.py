"""Weights in quant/: honest roundings stay within their bound, faults planted in the files are
named.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.checkpoints.safetensors import read_header, read_tensor
from calibration.methods.rtn import quantize
from calibration.out.files import sha256_file, write_json
from calibration.out.json_file import read_json
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantLinear, QuantScheme
from exporter.graph.decoder import export_onnx
from exporter.proof.judge import LayerReport
from exporter.proof.options import ValidateOptions
from exporter.proof.result import ValidationResult
from exporter.proof.validate import validate
from exporter.proof.weights import compare_weights, compared_tensors
from plugins import op_spec

SCHEMES: dict[str, dict[str, Any]] = {
    **{f"w{bits}": {"wbits": bits} for bits in range(1, 9)},
    "w1b": {"wbits": 1, "balanced": True},
    "w2b": {"wbits": 2, "balanced": True},
    "w4-g32": {"group_size": 32},
    "w4-g32-minimum": {"group_size": 32, "has_minimum": True},
    "qqq": {"op": "QQQGemm"},
    "qqq-g64": {"op": "QQQGemm", "group_size": 64},
    "bf16": {"dtype": "bfloat16"},
}


def weights(kind: str) -> np.ndarray:
    """[48, 128] of one distribution, with an all-zero row."""
    random = np.random.default_rng(0)
    array = {
        "normal": random.standard_normal,
        "heavy": lambda size: random.standard_t(2, size),
        "positive": random.random,
        "outlier": random.standard_normal,
    }[kind]((48, 128)).astype(np.float32)
    if kind == "outlier":
        array[:, 5] *= 300
    array[7] = 0
    return array


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive", "outlier"])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_honest_weight_leaves_its_bound(name: str, kind: str) -> None:
    scheme = QuantScheme(
        **{"op": "ABQGemm", "method": "rtn", "wbits": 4, "abits": 8, **SCHEMES[name]}
    )
    weight = weights(kind)
    error = np.abs(QuantLinear("x", scheme, quantize(weight, None, scheme)).dequantize() - weight)
    bound = op_spec(scheme.op).rounding_bound(weight, scheme.gemm)
    assert bound.dtype == np.float32
    assert (error <= bound * 1.01 + np.abs(weight) * 2.0**-20).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_honest_folders_pass(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, name: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    quant = read_quant(tiny_quant(**SCHEMES[name]) / "quant")
    rows = compare_weights(checkpoint, quant)
    assert len(rows) == compared_tensors(checkpoint, quant) == 1 + 2 * (2 + 7) + 1 + 1
    assert [row.tensor for row in rows[:3]] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]
    assert all(row.ok and row.limit is not None and row.level == "weights" for row in rows)


# ---------------------------------------------------------------- faults in quant/

Arrays = dict[str, np.ndarray]  # writable views of the file, by tensor name


def zeroed(arrays: Arrays) -> None:
    name = "model.layers.1.mlp.down_proj"
    arrays[f"{name}.codes"][:] = arrays.get(f"{name}.zero", 0)


def doubled_row(arrays: Arrays) -> None:
    arrays["model.layers.1.self_attn.o_proj.scale"][5] *= 2


def zero_scales(arrays: Arrays) -> None:
    arrays["model.layers.0.self_attn.v_proj.scale"][:] = 0


def swapped(arrays: Arrays) -> None:
    for end in ("codes", "scale", "zero"):
        pair = [
            arrays[f"model.layers.1.mlp.{name}.{end}"]
            for name in ("gate_proj", "up_proj")
            if f"model.layers.1.mlp.{name}.{end}" in arrays
        ]
        if pair:
            pair[0][:], pair[1][:] = pair[1].copy(), pair[0].copy()


def norm(arrays: Arrays) -> None:
    array = arrays["model.layers.1.input_layernorm.weight"]
    array[9] = array[9] * array.dtype.type(1.01)


FAULTS: dict[str, tuple[Callable[[Arrays], None], str, str]] = {
    "one linear zeroed": (zeroed, "model.layers.1.mlp.down_proj", ""),
    "one scale row doubled": (doubled_row, "model.layers.1.self_attn.o_proj", "in row 5 "),
    "scales lost": (zero_scales, "model.layers.0.self_attn.v_proj", ""),
    "gate and up swapped": (swapped, "model.layers.1.mlp.gate_proj", ""),
    "a norm's weight": (norm, "model.layers.1.input_layernorm.weight", ""),
}
PLACES = {
    "w8": {"wbits": 8},
    "w4": {},
    "w2b": {"wbits": 2, "balanced": True},
    "w1b": {"wbits": 1, "balanced": True},
    "qqq": {"op": "QQQGemm"},
    "qqq-g64": {"op": "QQQGemm", "group_size": 64},
}


def copy_with_fault(whole: Path, out: Path, plant: Callable[[Arrays], None]) -> Path:
    """A copy of OUT with a fault in quant/ and checksums to match."""
    shutil.copytree(whole, out)
    meta = read_json(out / "quant" / "quant.json")
    for name in [name for name in meta["files"] if name.endswith(".safetensors")]:
        path = out / "quant" / name
        plant(
            {
                key: np.memmap(path, read_tensor(path, entry).dtype, "r+", entry.start, entry.shape)
                for key, entry in read_header(path).items()
            }
        )
        meta["files"][name] = sha256_file(path)
    write_json(out / "quant" / "quant.json", meta)
    return out


def bad_rows(out: Path, model: Path) -> list[LayerReport]:
    quant = read_quant(out / "quant")
    return [
        row
        for row in compare_weights(open_checkpoint(str(model), offline=True), quant)
        if not row.ok
    ]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, place: str, fault: str
) -> None:
    plant, tensor, _ = FAULTS[fault]
    bad = bad_rows(
        copy_with_fault(tiny_quant(**PLACES[place]), tmp_path / "out", plant), tiny_model_dir
    )
    names = [row.tensor for row in bad]
    assert names == [
        tensor,
        *(["model.layers.1.mlp.up_proj"] if fault == "gate and up swapped" else []),
    ]


def whole_validation(
    tiny_quant: Callable[..., Path], model: Path, out: Path, plant: Callable[[Arrays], None]
) -> ValidationResult:
    copy_with_fault(tiny_quant(wbits=2, balanced=True), out, plant)
    (out / "onnx").mkdir()
    export_onnx(read_quant(out / "quant"), out / "onnx")
    return validate(out, ValidateOptions(tokens=8, steps=0, model=str(model)))


@pytest.mark.parametrize("fault", list(FAULTS)[:4])
def test_validation_fails_and_names_the_linear(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, fault: str
) -> None:
    """The export is faithful to the broken codes, so only the weights can tell."""
    plant, tensor, place = FAULTS[fault]
    result = whole_validation(tiny_quant, tiny_model_dir, tmp_path / "out", plant)
    assert not result.ok and all(row.ok for row in result.rows if row.level == "export")
    assert result.first_failure.startswith("got a relative error of ")
    assert (
        f"{place}at {tensor} (weights: the tensors in quant/ against the float model's), "
        f"expected at most " in result.first_failure
    )


def test_other_methods_are_shown_but_not_judged(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """They may transform the weights; NaN fails all the same."""

    def not_a_number(arrays: Arrays) -> None:
        arrays["model.layers.0.mlp.up_proj.scale"][3] = np.nan

    for number, (plant, names) in enumerate(
        ((swapped, []), (not_a_number, ["model.layers.0.mlp.up_proj"]))
    ):
        out = copy_with_fault(tiny_quant(), tmp_path / str(number), plant)
        quant = read_quant(out / "quant")
        quant.scheme = replace(quant.scheme, method="qqq")
        rows = compare_weights(open_checkpoint(str(tiny_model_dir), offline=True), quant)
        assert [row.tensor for row in rows if not row.ok] == names
        assert all(row.limit is None and row.operator_limit is None for row in rows)


def test_biases_and_missing_tensors(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from calibration.quant.quantize import QuantizeOptions, quantize_model

    model = tiny_llama(attention_bias=True)
    checkpoint = open_checkpoint(str(model), offline=True)
    (tmp_path / "quant").mkdir()
    quantize_model(
        checkpoint, QuantScheme("ABQGemm", "rtn", 4, 8), QuantizeOptions(), tmp_path / "quant"
    )
    quant = read_quant(tmp_path / "quant")
    name = "model.layers.1.self_attn.k_proj.bias"
    rows = {row.tensor: row for row in compare_weights(checkpoint, quant)}
    assert rows[name].ok and rows[name].relative == 0
    del quant._entries[name]
    bad = [row for row in compare_weights(checkpoint, quant) if not row.ok]
    assert [row.tensor for row in bad] == [name] and bad[0].relative is None
