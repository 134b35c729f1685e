"""Faults planted in an exported graph and its data are found at their own operator, down to one
code at eight bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.proof.options import ValidateOptions
from exporter.proof.result import ValidationResult
from exporter.proof.validate import validate
from plugins.errors import CheckError

pytestmark = pytest.mark.slow  # a minute as a whole

Fault = Callable[[onnx.ModelProto, Path], None]


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(
    model: onnx.ModelProto, data: Path, name: str, index: int, make: Callable[[Any], Any]
) -> None:
    """Change one element of a tensor in the data file."""
    tensor = initializer(model, name)
    offset = next(int(item.value) for item in tensor.external_data if item.key == "offset")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.memmap(data, dtype, "r+", offset, tuple(tensor.dims)).reshape(-1)
    array[index] = make(array[index])
    array.flush()


def wrong_scale(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.1.self_attn.o_proj.scale", 7, lambda value: value * 1.5)


def nan_scale(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.1.mlp.down_proj.scale", 3, lambda value: np.nan)


def lost_zero_point(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.0.mlp.down_proj.zero", 5, lambda value: 0)


def one_flipped_weight_bit(model: onnx.ModelProto, data: Path) -> None:
    # The last plane holds the most significant bit; the first word of row 0 of that plane, one
    # weight.
    planes, rows, words = initializer(model, "model.layers.0.self_attn.qkv_proj.weight").dims
    change(
        model,
        data,
        "model.layers.0.self_attn.qkv_proj.weight",
        (planes - 1) * rows * words,
        lambda value: value ^ 1,
    )


def swapped_initializers(model: onnx.ModelProto, data: Path) -> None:
    pair = [initializer(model, f"model.layers.{i}.mlp.gate_up_proj.weight") for i in range(2)]
    pair[0].name, pair[1].name = pair[1].name, pair[0].name


def wrong_norm(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "model.layers.1.post_attention_layernorm.weight", 4, lambda value: -value)


def wrong_embedding(model: onnx.ModelProto, data: Path) -> None:
    change_whole(
        model,
        data,
        "model.embed_tokens.weight",
        lambda table: table * np.where(np.arange(table.shape[1]) % 2, 1, 1.25),
    )


def lost_residual(model: onnx.ModelProto, data: Path) -> None:
    node = next(node for node in model.graph.node if node.name == "model.layers.1.residual")
    node.input[0] = node.input[1]


def swapped_gate_and_up(model: onnx.ModelProto, data: Path) -> None:
    """In a function of the node's own, since all layers share theirs."""
    node = next(node for node in model.graph.node if node.name == "model.layers.1.mlp.product")
    own = model.functions.add()
    own.CopyFrom(next(function for function in model.functions if function.name == node.op_type))
    own.node[0].output[:] = list(own.node[0].output)[::-1]
    imported = model.opset_import.add(version=1)
    own.domain = node.domain = imported.domain = f"{node.domain}.v1"


def wrong_rotation(model: onnx.ModelProto, data: Path) -> None:
    change(model, data, "rope.cos", 10 * 8 + 2, lambda value: -value)  # position 10, one frequency


def values_of_another_layer(model: onnx.ModelProto, data: Path) -> None:
    node = next(
        node for node in model.graph.node if node.output[0] == "model.layers.1.self_attn.context"
    )
    node.input[2] = "model.layers.0.self_attn.value"


def change_whole(
    model: onnx.ModelProto, data: Path, name: str, make: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Change a tensor in the data file."""
    tensor = initializer(model, name)
    offset = next(int(item.value) for item in tensor.external_data if item.key == "offset")
    array = np.memmap(
        data,
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        "r+",
        offset,
        tuple(tensor.dims),
    )
    array[:] = make(array)
    array.flush()


def lowest_plane(make: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def plant(model: onnx.ModelProto, data: Path) -> None:
        change_whole(
            model,
            data,
            "model.layers.1.mlp.gate_up_proj.weight",
            lambda planes: np.concatenate([make(planes[:1]), planes[1:]]),
        )

    return plant


def shifted_zero_point(model: onnx.ModelProto, data: Path) -> None:
    change_whole(model, data, "model.layers.1.self_attn.o_proj.zero", lambda zero: zero + 1)


def bfloat16_scales(model: onnx.ModelProto, data: Path) -> None:
    change_whole(
        model,
        data,
        "model.layers.0.mlp.down_proj.scale",
        lambda scale: (scale.view(np.uint32) & 0xFFFF0000).view(np.float32),
    )


def lost_bias(model: onnx.ModelProto, data: Path) -> None:
    change_whole(model, data, "model.layers.1.self_attn.qkv_proj.bias", np.zeros_like)


QKV_NORM, MLP_NORM = "(with input_layernorm)", "(with post_attention_layernorm)"

SMALL_FAULTS: dict[str, tuple[Fault, str]] = {
    "lowest plane dropped": (
        lowest_plane(np.zeros_like),
        f"model.layers.1.mlp.gate_up_proj {MLP_NORM}",
    ),
    "lowest plane inverted": (
        lowest_plane(np.invert),
        f"model.layers.1.mlp.gate_up_proj {MLP_NORM}",
    ),
    "zero points off by one": (shifted_zero_point, "model.layers.1.self_attn.o_proj"),
    "scales cut to bfloat16": (bfloat16_scales, "model.layers.0.mlp.down_proj"),
}


# Scales cut to bfloat16 are up to 2^-7 off, which is the last bit of a bfloat16 output.
@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for name in SMALL_FAULTS
        for dtype in ("float16", "bfloat16", "float32")
        if (name, dtype) != ("scales cut to bfloat16", "bfloat16")
    ],
)
def test_a_fault_of_one_code_is_found_at_eight_bits(
    tiny_export: Callable[..., Path], tmp_path: Path, name: str, dtype: str
) -> None:
    plant, node = SMALL_FAULTS[name]
    result = validate_with(tiny_export(wbits=8, dtype=dtype), tmp_path / "out", plant)
    assert f" at {node} given its inputs (export, prefill: " in result.first_failure, (
        result.first_failure
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_lost_bias_is_found(tiny_llama: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.quant.folder import read_quant
    from calibration.quant.quantize import QuantizeOptions, quantize_model
    from calibration.quant.scheme import QuantScheme
    from exporter.graph.decoder import export_onnx

    whole = tmp_path / "whole"
    for folder in ("quant", "onnx"):
        (whole / folder).mkdir(parents=True)
    checkpoint = open_checkpoint(str(tiny_llama(attention_bias=True)), offline=True)
    quantize_model(
        checkpoint,
        QuantScheme("ABQGemm", "rtn", 8, 8, dtype=dtype),
        QuantizeOptions(),
        whole / "quant",
    )
    export_onnx(read_quant(whole / "quant"), whole / "onnx")
    assert validate(whole, ValidateOptions(tokens=24, steps=0)).ok
    result = validate_with(whole, tmp_path / "out", lost_bias)
    assert (
        f" at model.layers.1.self_attn.qkv_proj {QKV_NORM} given its inputs (export, prefill: "
        in result.first_failure
    )


def test_a_missing_custom_node_fails(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    """Inlined functions compute the same without our kernels; then there is nothing to compare."""

    def plant(model: onnx.ModelProto, data: Path) -> None:
        node = next(
            node for node in model.graph.node if node.name == "model.layers.1.mlp.down_proj"
        )
        node.domain = ""

    with pytest.raises(CheckError) as caught:
        validate_with(tiny_export(), tmp_path / "out", plant)
    assert str(caught.value) == (
        "model.onnx: got 7 custom nodes without model.layers.1.mlp.down_proj, expected 8: 4 in "
        "each of 2 decoder "
        "layers. The graph was changed after its export (inlined functions?): export the model again."
    )


FAULTS: dict[str, tuple[Fault, str]] = {
    "scale": (
        wrong_scale,
        "in output channel 7 at model.layers.1.self_attn.o_proj given its inputs (export, prefill: ",
    ),
    "nan": (
        nan_scale,
        "relative error of inf at model.layers.1.mlp.down_proj given its inputs (export, prefill: ",
    ),
    "zero point": (
        lost_zero_point,
        "in output channel 5 at model.layers.0.mlp.down_proj given its inputs (export, prefill: ",
    ),
    "weight bit": (
        one_flipped_weight_bit,
        f"in output channel 0 at model.layers.0.self_attn.qkv_proj {QKV_NORM} given its inputs "
        f"(export, prefill: ",
    ),
    "swap": (
        swapped_initializers,
        f" at model.layers.0.mlp.gate_up_proj {MLP_NORM} given its inputs (export, prefill: ",
    ),
    "norm": (
        wrong_norm,
        f" at model.layers.1.mlp.gate_up_proj {MLP_NORM} given its inputs (export, prefill: ",
    ),
    "embedding": (wrong_embedding, " at model.embed_tokens given its inputs (export, prefill: "),
    "residual": (lost_residual, " at model.layers.1.residual given its inputs (export, prefill: "),
    "gate and up": (
        swapped_gate_and_up,
        " at model.layers.1.mlp.product given its inputs (export, prefill: ",
    ),
    "rope": (wrong_rotation, " at present.0.key given its inputs (export, prefill: "),
    "values": (
        values_of_another_layer,
        " at present.1.value given its inputs (export, prefill: ",
    ),
}


@pytest.mark.parametrize(
    "name, abits", [*((name, 8) for name in FAULTS), ("weight bit", 4), ("scale", 4)]
)
def test_a_fault_is_found_where_it_is(
    tiny_export: Callable[..., Path], tmp_path: Path, name: str, abits: int
) -> None:
    plant, expected = FAULTS[name]
    result = validate_with(tiny_export(abits=abits), tmp_path / "out", plant)
    assert not result.ok and expected in result.first_failure, result.first_failure
    assert result.first_failure.startswith("got a relative error of ")
    layer = next(
        (part for part in expected.split(".") if part.isdigit()), "0"
    )  # the embedding is judged with the first
    first_bad = next(row for row in result.rows if not row.ok)
    assert (first_bad.level, first_bad.phase, first_bad.tensor) == (
        "export",
        "prefill",
        f"model.layers.{layer}.output",
    )


@pytest.mark.parametrize(
    ("node", "gamma"),
    [
        ("self_attn.qkv_proj", "model.layers.0.input_layernorm.weight"),
        ("mlp.gate_up_proj", "model.norm.weight"),
        ("mlp.gate_up_proj", "gamma7"),
    ],
)
def test_a_node_that_reads_another_norm_is_named(
    tiny_export: Callable[..., Path], tmp_path: Path, node: str, gamma: str
) -> None:
    name = f"model.layers.1.{node}"

    def rewire(model: onnx.ModelProto, data: Path) -> None:
        found = next(item for item in model.graph.node if item.name == name)
        if gamma == "gamma7":
            next(
                item for item in model.graph.initializer if item.name == found.input[-1]
            ).name = gamma
        found.input[-1] = gamma

    norm = {
        "self_attn.qkv_proj": "input_layernorm",
        "mlp.gate_up_proj": "post_attention_layernorm",
    }[node]
    with pytest.raises(CheckError) as error:
        validate_with(tiny_export(), tmp_path / "out", rewire)
    assert str(error.value) == (
        f"model.onnx, node {name}: got {gamma} as the weight of its norm, expected "
        f"model.layers.1.{norm}.weight. "
        "The graph was changed after its export: export the model again."
    )


def test_a_wrong_epsilon_is_found_at_its_node(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    def lost(model: onnx.ModelProto, data: Path) -> None:
        node = next(
            item for item in model.graph.node if item.name == "model.layers.1.mlp.gate_up_proj"
        )
        next(item for item in node.attribute if item.name == "norm_epsilon").f = 1000.0

    result = validate_with(tiny_export(), tmp_path / "out", lost)
    assert (
        f" at model.layers.1.mlp.gate_up_proj {MLP_NORM} given its inputs (export, prefill: "
        in result.first_failure
    )


def test_a_wrong_norm_that_stands_apart_is_found(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    result = validate_with(tiny_export(fuse_norms=False), tmp_path / "out", wrong_norm)
    assert (
        " at model.layers.1.post_attention_layernorm given its inputs (export, prefill: "
        in result.first_failure
    )


def validate_with(whole: Path, out: Path, plant: Fault) -> ValidationResult:
    """Validate a copy of an export with a fault in it, prefill only."""
    shutil.copytree(whole, out)
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    plant(model, out / "onnx" / "model.onnx.data")
    path.write_bytes(model.SerializeToString())
    return validate(out, ValidateOptions(tokens=24, steps=0))  # no float model: quicker
