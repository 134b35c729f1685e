"""Checkpoints of other tools, written here bit by bit: their codes reach quant/ untouched, and stand
for the weights that the formats' documents say, to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from calibration import formats
from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.checkpoints.codes import Form, StoredLinear, Tensors
from calibration.checkpoints.huggingface import SafetensorsWeights
from calibration.formats.compressed_tensors import read as read_compressed
from calibration.formats.fp8 import read as read_fp8
from calibration.quant.folder import QuantModel, read_quant
from calibration.quant.keep import Keeping, check_quantized, kept_arrays, kept_schemes
from calibration.quant.quantize import QuantizeOptions, quantize_model
from calibration.quant.scheme import QuantScheme
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from tests.calibration.formats import written
from tests.calibration.formats.written import Written
from tests.conftest import FAMILIES

CASES: dict[str, tuple[Callable[..., Written], dict[str, Any], str]] = {
    "gptq": (written.gptq, {}, "ABQGemm w4a16-g32"),
    "gptq asymmetric": (written.gptq, {"symmetric": False}, "ABQGemm w4a16-g32"),
    "gptq 2 bits": (written.gptq, {"bits": 2, "group": -1}, "ABQGemm w2a16"),
    "gptq 3 bits": (written.gptq, {"bits": 3, "symmetric": False}, "ABQGemm w3a16-g32"),
    "gptq 8 bits": (written.gptq, {"bits": 8, "version": 2}, "ABQGemm w8a16-g32"),
    "gptq v2": (written.gptq, {"version": 2, "symmetric": False}, "ABQGemm w4a16-g32"),
    "gptq cut groups": (written.gptq, {"group": 48}, "ABQGemm w4a16-g16"),
    "gptq desc_act": (written.gptq, {"ordered": True, "symmetric": False}, "ABQGemm w4a16-g32"),
    "awq": (written.awq, {}, "ABQGemm w4a16-g32"),
    "awq of rows": (written.awq, {"group": -1}, "ABQGemm w4a16"),
    "packed 4": (written.packed, {"bits": 4, "group": 32, "symmetric": False}, "ABQGemm w4a16-g32"),
    "packed 8": (written.packed, {"bits": 8, "group": None, "symmetric": True}, "ABQGemm w8a16"),
    "packed actorder": (
        written.packed,
        {"bits": 4, "group": 16, "symmetric": True, "actorder": True},
        "ABQGemm w4a16-g16",
    ),
    "int 8": (written.integers, {"bits": 8}, "ABQGemm w8a8"),
    "int 8 zero": (written.integers, {"bits": 8, "symmetric": False}, "ABQGemm w8a8"),
    "int 4": (written.integers, {"bits": 4}, "QQQGemm w4a8"),
    "int 4 groups": (written.integers, {"bits": 4, "group": 32}, "ABQGemm w4a8-g32"),
    "qqq": (written.qqq, {"group": -1}, "QQQGemm w4a8"),
    "qqq groups": (written.qqq, {"group": 128}, "QQQGemm w4a8"),
    "abq 2*": (written.abq_llm, {"levels": 5}, "ABQGemm w2ba16"),
    "int8 of bitsandbytes": (written.bnb8, {}, "ABQGemm w8a16"),
    "mxfp4": (written.fp4, {"kind": "mxfp4"}, "ABQGemm w5a16-g32"),
    "nvfp4": (written.fp4, {"kind": "nvfp4"}, "ABQGemm w5a16-g16"),
    "hqq": (written.hqq, {}, "ABQGemm w4a16-g32"),
    "hqq 3 bits": (written.hqq, {"bits": 3, "dtype": ml_dtypes.bfloat16}, "ABQGemm w3a16-g32"),
    "hqq 2 bits": (written.hqq, {"bits": 2, "group": 16, "as_float": True}, "ABQGemm w2a16-g16"),
    "hqq three levels": (written.hqq, {"bits": 1.58, "group": 64}, "ABQGemm w2a16"),
    "hqq 5 bits": (written.hqq, {"bits": 5, "group": 16}, "ABQGemm w5a16-g16"),
    "abq 4": (written.abq_llm, {"levels": 16, "group": 32}, "ABQGemm w4a16-g32"),
}


@pytest.fixture(scope="module")
def source(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float16", num_hidden_layers=1)


@pytest.fixture(scope="module")
def wide(tiny_llama: Callable[..., Path]) -> Path:
    """QQQ's tiles ask for more."""
    return tiny_llama(
        dtype="float16",
        num_hidden_layers=1,
        hidden_size=128,
        intermediate_size=256,
        num_key_value_heads=4,
    )


def keep(folder: Path, to: Path, **asked: Any) -> tuple[Checkpoint, QuantModel]:
    checkpoint = open_checkpoint(str(folder), offline=True)
    to.mkdir()
    quantize_model(checkpoint, kept_schemes(checkpoint, Keeping(**asked)), QuantizeOptions(), to)
    return checkpoint, read_quant(to)


@pytest.mark.parametrize("name", CASES)
def test_codes_stay_and_stand_for_the_documents_weights(
    source: Path, wide: Path, tmp_path: Path, name: str
) -> None:
    make, options, expected = CASES[name]
    made = make(wide if make is written.qqq else source, tmp_path / "model", **options)
    checkpoint, quant = keep(made.folder, tmp_path / "quant")
    assert f"{quant.scheme.op} {quant.scheme.label}" == expected
    assert quant.calibration == {"kept": checkpoint.format} and not checkpoint.warnings
    for layer, weight in made.weights.items():
        np.testing.assert_array_equal(checkpoint.array(f"{layer}.weight"), weight, layer)
        linear, order = quant.linear(layer), quant.order(layer)
        codes = linear.arrays.codes
        if codes.dtype == np.int8 and made.codes[layer].min() >= 0:
            codes = codes.astype(int) + 8
        order = slice(None) if order is None else order
        np.testing.assert_array_equal(codes, made.codes[layer][:, order], layer)
        np.testing.assert_array_equal(linear.dequantize(), weight[:, order], layer)
    with safe_open(made.folder / "model.safetensors", "numpy") as rest:
        for tensor in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
            np.testing.assert_array_equal(quant.tensor(tensor), rest.get_tensor(tensor))
    assert len(quant.decoder.orders) == (4 if options.get("ordered", "actorder" in name) else 0)


def test_what_is_asked_for_beside_the_codes(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model", group=-1)
    _, quant = keep(made.folder, tmp_path / "a8", abits=8, kv_bits=8, head_bits=8, dtype="float32")
    assert [quant.scheme.op, quant.scheme.label, quant.scheme.kv_bits, quant.scheme.dtype] == [
        "QQQGemm",
        "w4a8",
        8,
        "float32",
    ]  # symmetric codes of whole rows are that op's too
    assert quant.head is not None
    assert (quant.head.op, quant.head.label, quant.head.method) == ("ABQGemm", "w8a8", "rtn")
    assert quant.scheme.method == "kept"
    _, quant = keep(made.folder, tmp_path / "a6", abits=6)
    assert (quant.scheme.op, quant.scheme.label, quant.head) == ("ABQGemm", "w4a6", None)


def test_a_quantized_head_is_kept(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    own = tiny_llama(dtype="float16", num_hidden_layers=1, tie_word_embeddings=False)
    made = written.gptq(own, tmp_path / "model", head=True)
    _, quant = keep(made.folder, tmp_path / "quant", abits=8)
    assert quant.head is not None
    assert (quant.head.label, quant.head.method) == ("w4a8-g32", "kept")
    weight = made.weights["lm_head"]
    np.testing.assert_array_equal(quant.linear("lm_head").dequantize(), weight)


def test_our_own_folder_comes_back(tiny_quant: Callable[..., Path], tmp_path: Path) -> None:
    from calibration.formats.compressed_tensors import write

    for number, fields in enumerate(
        [{"wbits": 4, "abits": 16, "group_size": 32}, {"op": "QQQGemm"}, {"wbits": 8, "abits": 8}]
    ):
        quant = read_quant(tiny_quant(**fields) / "quant")
        folder = tmp_path / f"written{number}"
        folder.mkdir()
        write(quant, folder)
        _, kept = keep(folder, tmp_path / f"kept{number}")
        same = {"method": "kept"}
        assert kept.scheme.as_dict() == quant.scheme.as_dict() | same
        for name in quant.decoder.linears:
            one, other = quant.linear(name).arrays.named(), kept.linear(name).arrays.named()
            assert one.keys() == other.keys()
            for array in one:
                np.testing.assert_array_equal(one[array], other[array], f"{name}.{array}")


def test_what_another_format_has_no_word_for(source: Path, tmp_path: Path) -> None:
    """From a finished folder, too, whose columns or head would be read as others."""
    made = written.gptq(source, tmp_path / "model", ordered=True)
    _, quant = keep(made.folder, tmp_path / "ordered")
    assert refusal(lambda: formats.write("compressed-tensors", quant)) == (
        "--format compressed-tensors: got model.layers.0.self_attn.qkv_proj with its input channels in "
        "an order of their own, expected them in order. Leave out --format."
    )
    made = written.gptq(source, tmp_path / "plain", group=-1)
    _, quant = keep(made.folder, tmp_path / "head", head_bits=8)
    assert refusal(lambda: formats.write("compressed-tensors", quant)) == (
        "--head-bits: got 8 with --format compressed-tensors, expected 16: other tools read the head "
        "as floats. Add --head-bits 16, or leave out --format compressed-tensors."
    )
    assert not [*tmp_path.glob("*/compressed-tensors")]


def test_requantizing_takes_the_floats(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model")
    checkpoint = open_checkpoint(str(made.folder), offline=True)
    (tmp_path / "quant").mkdir()
    scheme = QuantScheme("ABQGemm", "rtn", 8, 8)
    quantize_model(checkpoint, scheme, QuantizeOptions(), tmp_path / "quant")
    name = "model.layers.0.mlp.down_proj"
    found = read_quant(tmp_path / "quant").linear(name).dequantize()
    np.testing.assert_allclose(found, made.weights[name], atol=0.01)


FLOATS: dict[str, tuple[Callable[..., Written], dict[str, Any], str]] = {
    "fp8 blocks": (written.fp8, {"block": (48, 32)}, "fp8"),
    "fp8": (written.fp8, {"block": None}, "fp8"),
    "nf4": (written.bnb4, {}, "bitsandbytes"),
    "nf4 nested": (written.bnb4, {"nested": True}, "bitsandbytes"),
    "nf4 in one block": (written.bnb4, {"block": 16384}, "bitsandbytes"),
    "nf4 in bfloat16": (written.bnb4, {"storage": ml_dtypes.bfloat16}, "bitsandbytes"),
    "fp4": (written.bnb4, {"kind": "fp4", "block": 48}, "bitsandbytes"),  # the last is cut short
    "fp4 nested": (written.bnb4, {"kind": "fp4", "nested": True}, "bitsandbytes"),
    "hqq across rows": (written.hqq, {"axis": 0, "group": 16}, "hqq"),
    "hqq three halves": (written.hqq, {"group": 128, "bits": 1}, "hqq"),  # of a group in a row
    "hqq fp32": (written.hqq, {"dtype": np.float32, "bits": 8}, "hqq"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_read_as_floats(source: Path, tmp_path: Path, name: str) -> None:
    make, options, format = FLOATS[name]
    made = make(source, tmp_path / "model", **options)
    checkpoint = open_checkpoint(str(made.folder), offline=True)
    for layer, weight in made.weights.items():
        np.testing.assert_array_equal(checkpoint.array(f"{layer}.weight"), weight, layer)
    assert check_quantized(checkpoint, False, True) == ""
    assert refusal(lambda: check_quantized(checkpoint, False, False)) == (
        f"{made.folder}: got a checkpoint that is quantized already ({format}), with weights that no "
        "op takes as they are, expected --requantize. --requantize rounds its weights again, with "
        "--wbits and --abits."
    )
    assert refusal(lambda: kept_schemes(checkpoint, Keeping())) == (
        f"{made.folder}, model.layers.0.self_attn.q_proj: got weights without codes that an op takes, "
        "expected such for --keep. --requantize rounds its weights again, with --wbits and --abits."
    )


@pytest.mark.parametrize(
    ("make", "file", "names"),
    [
        (written.gptq, "quantize_config.json", {}),
        (written.awq, "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"}),
    ],
)
def test_settings_in_a_file_of_their_own(
    source: Path, tmp_path: Path, make: Callable[..., Written], file: str, names: dict[str, str]
) -> None:
    made = make(source, tmp_path / "model")
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    path.write_text(json.dumps(config))
    (made.folder / file).write_text(json.dumps({names.get(k, k): v for k, v in settings.items()}))
    checkpoint = open_checkpoint(str(made.folder), offline=True)
    for layer, weight in made.weights.items():
        np.testing.assert_array_equal(checkpoint.array(f"{layer}.weight"), weight, layer)


def test_zero_points_of_the_other_version_are_doubted(source: Path, tmp_path: Path) -> None:
    """Of asymmetric codes only the mean of the weights tells."""
    made = written.gptq(source, tmp_path / "model", symmetric=False)
    tensors = load_file(made.folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qzeros")]:
        # a zero point of 8 each, among codes of 8 on the average
        tensors[name] = np.full_like(tensors[name], 0x77777777)
        size = tensors[name.replace("qzeros", "qweight")].size
        words = np.random.default_rng(size).integers(0, 1 << 31, size)
        pairs = (words & 0x0F0F0F0F) | ((0x10101010 - (words & 0x0F0F0F0F)) & 0x0F0F0F0F) << 4
        tensors[name.replace("qzeros", "qweight")] = (
            pairs.astype(np.uint32)
            .view(np.int32)
            .reshape(tensors[name.replace("qzeros", "qweight")].shape)
        )
    save_file(tensors, made.folder / "model.safetensors")
    assert not open_checkpoint(str(made.folder), offline=True).warnings
    change(made.folder, checkpoint_format="gptq_v2")
    (warning,) = open_checkpoint(str(made.folder), offline=True).warnings
    assert warning.endswith(
        "steps off zero on the average: checkpoint_format gptq_v2 may be wrong. If the model writes "
        "nonsense, try gptq."
    )


# ---------------------------------------------------------------- refusals


def change(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))


def damage(folder: Path, name: str, make: Callable[[np.ndarray], np.ndarray | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    found = make(tensors.pop(name).copy())
    save_file(tensors if found is None else tensors | {name: np.asarray(found)}, path)


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        work()
    return str(caught.value)


def put(place: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


AGAIN = "The checkpoint is damaged: download it again."
FLOAT = "Give the float model it was made from."
K = "model.layers.0.self_attn.k_proj"
IN_GROUPS = {"num_bits": 4, "type": "float", "group_size": 32, "actorder": "group"}
ROUNDED = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "strategy": "channel", "group_size": None},
}


@pytest.mark.parametrize(
    ("make", "settings", "problem"),
    [
        (
            written.gptq,
            {"bits": 5},
            f"quantization config: got bits 5, expected 2, 3, 4, 8. {FLOAT}",
        ),
        (
            written.gptq,
            {"bits": "4"},
            'quantization config, bits: got "4", expected a whole number. Correct the config.',
        ),
        (
            written.gptq,
            {"group_size": 0},
            f"quantization config: got group_size 0, expected -1 or a number above 0. {FLOAT}",
        ),
        (
            written.gptq,
            {"checkpoint_format": "marlin"},
            f"quantization config: got checkpoint_format marlin, expected gptq or gptq_v2. {FLOAT}",
        ),
        (
            written.gptq,
            {"dynamic": {"-:.*gate": {}, "+:.*down_proj": {"bits": 8}}},
            f"quantization config: got other settings for some layers (dynamic), expected one for all. {FLOAT}",
        ),
        (
            written.awq,
            {"version": "gemv"},
            f"quantization config: got version gemv, expected gemm. {FLOAT}",
        ),
        (
            written.awq,
            {"zero_point": 1},
            "quantization config, zero_point: got 1, expected true or false. Correct the config.",
        ),
        (
            partial(written.qqq, group=-1),
            {"wbits": 8},
            f"quantization config: got bits 8, expected 4. {FLOAT}",
        ),
        (
            partial(written.integers, bits=8),
            {"format": "float-quantized"},
            f"quantization_config, group_0: got format float-quantized, expected one of pack-quantized, int-quantized, mxfp4-pack-quantized, nvfp4-pack-quantized. {FLOAT}",
        ),
        (
            partial(written.integers, bits=8),
            {"config_groups": {}},
            "quantization_config: got no group for model.layers.0.mlp.down_proj among none, expected one "
            "that has it among its targets. Correct the config.",
        ),
        (
            partial(written.integers, bits=8),
            {"sparsity_config": {"format": "sparse-24"}},
            f"quantization_config: got a sparsity_config, expected none. {FLOAT}",
        ),
        (
            partial(written.integers, bits=8),
            {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}},
            "quantization_config: got a transform_config, whose rotations of activations no graph here "
            f"has, expected none. {FLOAT}",
        ),
        (
            partial(written.integers, bits=8),
            {"config_groups": {"a": ROUNDED | {"output_activations": {"num_bits": 8}}}},
            f"quantization_config, a: got output_activations, expected none. {FLOAT}",
        ),
        (
            partial(written.integers, bits=8),
            {"config_groups": {"a": ROUNDED | {"targets": ["re:[q"]}}},
            "quantization_config: got the target re:[q, which is no regular expression (unterminated "
            "character set at position 0). Correct the config.",
        ),
        (
            partial(written.fp4, kind="mxfp4"),
            {"format": "nvfp4-pack-quantized"},
            f"quantization_config, group_0: got group_size 32, expected 16. {FLOAT}",
        ),
        (
            partial(written.fp4, kind="mxfp4"),
            {"config_groups": {"a": {"targets": ["Linear"], "weights": IN_GROUPS}}},
            f"quantization_config, a: got actorder group, expected input channels in order. {FLOAT}",
        ),
        (
            partial(written.fp4, kind="nvfp4"),
            {"config_groups": {"a": {"targets": ["Linear"], "weights": ROUNDED["weights"]}}},
            f"quantization_config, a: got weights of type int, expected float. {FLOAT}",
        ),
        (
            partial(written.qqq, group=128),
            {"group_size": -1},
            "model.layers.0.mlp.down_proj.s_group: got scales of groups, [2, 128], expected none by "
            "group_size -1 of the config. Correct group_size: 128.",
        ),
    ],
)
def test_settings_that_are_not_read(
    source: Path,
    wide: Path,
    tmp_path: Path,
    make: Callable[..., Written],
    settings: dict[str, Any],
    problem: str,
) -> None:
    tiles = getattr(make, "func", make) is written.qqq
    made = make(wide if tiles else source, tmp_path / "model")
    change(made.folder, **settings)
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert found == f"{made.folder}, {problem}"


def test_formats_that_are_not_read(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model")
    change(made.folder, quant_method="aqlm")
    assert refusal(lambda: open_checkpoint(str(made.folder), offline=True)) == (
        f"{made.folder / 'config.json'}, quantization_config: got an already quantized checkpoint "
        "(quant_method aqlm), expected float32, float16 or bfloat16 weights, or those of abq-llm, awq, "
        f"bitsandbytes, compressed-tensors, fp8, gptq, hqq, qqq or a .gguf file. {FLOAT}"
    )


@pytest.mark.parametrize(
    ("tensor", "make", "problem"),
    [
        ("scales", put((0, 3), np.nan), "got nan at [0, 3] and 1 such in all"),
        ("scales", put((0, 3), 0), "got 0.0 at [0, 3] and 1 such in all"),
        ("scales", put((1, 0), np.inf), "got inf at [1, 0] and 1 such in all"),
    ],
)
def test_scales_that_are_none(
    source: Path, tmp_path: Path, tensor: str, make: Callable[..., Any], problem: str
) -> None:
    made = written.gptq(source, tmp_path / "model")
    damage(made.folder, f"{K}.{tensor}", make)
    assert refusal(lambda: keep(made.folder, tmp_path / "quant")) == (
        f"{made.folder}, {K}.{tensor}: {problem}, expected finite numbers other than 0. {AGAIN}"
    )


@pytest.mark.parametrize(
    ("make", "tensor"),
    [
        (written.awq, "scales"),
        (partial(written.packed, bits=4, group=32, symmetric=True), "weight_scale"),
        (partial(written.integers, bits=8), "weight_scale"),
        (partial(written.qqq, group=-1), "s_channel"),
        (partial(written.abq_llm, levels=16), "weight_quantizer.scales"),
        (written.bnb8, "SCB"),
        (written.hqq, "scale"),
    ],
)
def test_scales_of_every_format(
    source: Path, wide: Path, tmp_path: Path, make: Callable[..., Written], tensor: str
) -> None:
    tiles = getattr(make, "func", make) is written.qqq
    made = make(wide if tiles else source, tmp_path / "model")
    damage(made.folder, f"{K}.{tensor}", put(0, np.nan))
    found = refusal(lambda: keep(made.folder, tmp_path / "quant"))
    assert found.startswith(f"{made.folder}, {K}.{tensor}: got nan at [0") and found.endswith(AGAIN)


@pytest.mark.parametrize(
    ("tensor", "make", "problem"),
    [
        (
            "g_idx",
            put(5, 2),
            f".g_idx: got groups 0 to 2, expected 0 to 1 for 64 input channels in groups of 32. {AGAIN}",
        ),
        ("g_idx", put(5, 1), f".g_idx: got 31 input channels in group 0, expected 32. {AGAIN}"),
        (
            "scales",
            lambda array: array[:1],
            ".scales: got shape [1, 32], expected [2, 32] by the config's bits and group size. The "
            "config and the weights do not belong together, or groups differ between layers: give "
            "the checkpoint as its makers' tool wrote it.",
        ),
        (
            "qweight",
            lambda array: array[:-1],
            ".g_idx: got shape [64], expected [56] by the config's bits and group size. The config and "
            "the weights do not belong together, or groups differ between layers: give the checkpoint "
            "as its makers' tool wrote it.",
        ),
        (
            "qzeros",
            lambda array: None,
            ": got no qzeros, expected it beside the layer's other tensors. The download is "
            "incomplete or damaged: download it again.",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    source: Path, tmp_path: Path, tensor: str, make: Callable[..., Any], problem: str
) -> None:
    made = written.gptq(source, tmp_path / "model")
    damage(made.folder, f"{K}.{tensor}", make)
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert found == f"{made.folder}, {K}{problem}"


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("make", "tensor", "change", "problem"),
    [
        (
            written.bnb4,
            STATE,
            lambda array: None,
            ": got 0 tensors weight.quant_state.bitsandbytes__*, expected one for nf4 or fp4. Save the "
            "checkpoint with a newer bitsandbytes, or download it again.",
        ),
        (
            written.bnb4,
            STATE,
            lambda array: np.frombuffer(b'{"blocksize": 0, "shape": [32, 64]}', np.uint8),
            f".{STATE}, blocksize: got 0, expected at least 1. {AGAIN}",
        ),
        (
            written.bnb4,
            STATE,
            lambda array: np.frombuffer(b'{"blocksize": 64, "shape": [64, 64]}', np.uint8),
            ".weight.absmax: got shape [32], expected [64] by the config's bits and group size. The "
            "config and the weights do not belong together, or groups differ between layers: give the "
            "checkpoint as its makers' tool wrote it.",
        ),
        (
            written.bnb4,
            "weight",
            lambda array: array[1:],
            f".weight: got 1023 bytes, expected 1024 of 32 x 64 weights. {AGAIN}",
        ),
        (
            partial(written.bnb4, nested=True),
            "weight.nested_absmax",
            lambda array: None,
            ": got no weight.nested_absmax, expected it beside the layer's other tensors. The download "
            "is incomplete or damaged: download it again.",
        ),
        (
            partial(written.bnb4, nested=True),
            STATE,
            lambda array: np.frombuffer(
                array.tobytes().replace(b"nested_offset", b"nested_effort"), np.uint8
            ),
            f".{STATE}: got no nested_offset, expected it beside nested_blocksize. {AGAIN}",
        ),
        (
            written.bnb8,
            "weight_format",
            lambda array: array + np.uint8(1),
            ".weight_format: got weights in the order of a GPU's kernels, expected 0, which stands for "
            "rows. Load and save the checkpoint with a newer bitsandbytes.",
        ),
        (written.hqq, "axis", lambda array: array + 1, f": got axis 2, expected 0 or 1. {FLOAT}"),
        (
            written.hqq,
            "nbits",
            lambda array: array + 1,
            f": got 5 bits, expected 1 to 4 of packing 4bit_u8. {FLOAT}",
        ),
        (
            written.hqq,
            "nbits",
            lambda array: np.float32(np.nan),
            f".nbits: got nan, expected a finite number. {AGAIN}",
        ),
        (
            written.hqq,
            "packing",
            lambda array: array[:4],
            ": got packing 4bit, expected one of 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8. "
            f"{FLOAT}",
        ),
        (
            written.hqq,
            "group_size",
            lambda array: array - 1,
            f": got group_size 31, expected a divisor of 2048 weights. {FLOAT}",
        ),
        (
            written.hqq,
            "quant_zero",
            lambda array: array + np.uint8(1),
            f": got scales or zeros that are quantized themselves, expected numbers. {FLOAT}",
        ),
        (
            written.hqq,
            "W_q",
            lambda array: array[1:],
            f".W_q: got 992 bytes, expected 1024 by its shape. {AGAIN}",
        ),
        (
            written.hqq,
            "zero",
            lambda array: None,
            ": got no zero, expected it beside the layer's other tensors. The download is incomplete or "
            "damaged: download it again.",
        ),
    ],
)
def test_layers_that_do_not_fit_together(
    source: Path,
    tmp_path: Path,
    make: Callable[..., Written],
    tensor: str,
    change: Callable[[np.ndarray], np.ndarray | None],
    problem: str,
) -> None:
    """Of formats whose layers say by themselves how they are stored."""
    made = make(source, tmp_path / "model")
    damage(made.folder, f"{K}.{tensor}", change)
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert found == f"{made.folder}, {K}{problem}"


@pytest.mark.parametrize(
    ("make", "tensor", "change", "problem"),
    [
        (
            partial(written.fp4, kind="mxfp4"),
            "weight_scale",
            put((2, 1), 255),
            "got the exponent 255, which stands for no number, expected 0 to 254",
        ),
        (
            partial(written.hqq, bits=5, group=16),
            "W_q",
            put((2, 1), 33),
            "got the code 33, expected at most 31 of 5 bits",
        ),
        (
            written.hqq,
            "zero",
            put((2, 0), np.nan),
            "got nan at [2, 0] and 1 such in all, expected finite numbers",
        ),
        (
            partial(written.bnb4, nested=True),
            "weight.nested_quant_map",
            put(3, np.inf),
            "got inf at [3] and 1 such in all, expected finite numbers",
        ),
    ],
)
def test_numbers_that_are_none(
    source: Path,
    tmp_path: Path,
    make: Callable[..., Written],
    tensor: str,
    change: Callable[[np.ndarray], np.ndarray | None],
    problem: str,
) -> None:
    made = make(source, tmp_path / "model")
    damage(made.folder, f"{K}.{tensor}", change)
    checkpoint = open_checkpoint(str(made.folder), offline=True)
    assert refusal(lambda: checkpoint.array(f"{K}.weight")) == (
        f"{made.folder}, {K}.{tensor}: {problem}. {AGAIN}"
    )


def test_a_row_of_zeros_in_int8_of_bitsandbytes(source: Path, tmp_path: Path) -> None:
    """Its largest magnitude is 0."""
    made = written.bnb8(source, tmp_path / "model")
    for tensor in ("SCB", "weight"):
        damage(made.folder, f"{K}.{tensor}", put(3, 0))
    _, quant = keep(made.folder, tmp_path / "quant")
    weight = made.weights[K]
    weight[3] = 0
    np.testing.assert_array_equal(quant.linear(K).dequantize(), weight)


def test_weights_beyond_fp32_are_not_kept(source: Path, tmp_path: Path) -> None:
    made = written.fp4(source, tmp_path / "model", "mxfp4")
    damage(made.folder, f"{K}.weight_scale", put((2, 1), 254))
    assert refusal(lambda: keep(made.folder, tmp_path / "quant")) == (
        f"{made.folder}, {K}: got scales of weights beyond fp32 at [2, 1] and 1 such in all, expected "
        f"finite weights. {AGAIN}"
    )
    weights = StoredLinear("m, a", (4, 32), Form(code_set(4, False), minimum=True), wide_minimum)
    scheme = QuantScheme("ABQGemm", "kept", 4, 16, has_minimum=True)
    assert refusal(lambda: kept_arrays(weights, scheme)) == (
        f"m, a: got scales of weights beyond fp32 at [0, 0] and 4 such in all, expected finite "
        f"weights. {AGAIN}"
    )


def wide_minimum() -> QuantArrays:
    scale = np.ones((4, 1), np.float32)
    return QuantArrays(np.zeros((4, 32), np.uint8), scale, minimum=-np.inf * scale)


def test_a_scale_of_fp8_that_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    scale = np.ones((4, 1), ml_dtypes.float8_e4m3fn)
    scale[2] = np.nan
    tensors = {
        "a.weight_packed": np.zeros((4, 8), np.uint8),
        "a.weight_scale": scale,
        "a.weight_global_scale": np.ones(1, np.float32),
    }
    save_file(tensors, path)
    group = {"num_bits": 4, "type": "float", "group_size": 16}
    settings = {
        "format": "nvfp4-pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": group}},
    }
    stored = read_compressed(settings, Tensors(SafetensorsWeights([path]), "m"))
    assert refusal(stored.linears["a"].dequantized) == (
        f"m, a.weight_scale: got the scale nan, expected numbers. {AGAIN}"
    )


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_activations_of_4_bit_floats_are_spoken_of(source: Path, tmp_path: Path, kind: str) -> None:
    seen = {"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "tensor_group"}
    made = written.fp4(source, tmp_path / "model", kind, seen)
    checkpoint, quant = keep(made.folder, tmp_path / "quant", abits=8)
    assert checkpoint.warnings == [
        "The checkpoint was made for activations of 4-bit float numbers, which no op here has: "
        "--abits says how they are rounded."
    ]
    assert quant.scheme.label == ("w5a8-g32" if kind == "mxfp4" else "w5a8-g16")


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_floats_of_4_bits_are_those_of_their_package(kind: str, tmp_path: Path) -> None:
    """compressed-tensors itself dequantizes in bfloat16."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file as save

    compressor = MXFP4PackedCompressor if kind == "mxfp4" else NVFP4PackedCompressor
    args = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    args |= {"strategy": "group", "group_size": 32}
    if kind == "nvfp4":
        args |= {"strategy": "tensor_group", "group_size": 16}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    random = torch.Generator().manual_seed(3)
    size = args["group_size"]
    scale = torch.randint(1, 6, (24, 96 // size), generator=random).float().exp2() / 64
    tensors = {"weight": torch.randn(24, 96, generator=random), "weight_scale": scale}
    if kind == "nvfp4":
        tensors["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
        tensors["weight_global_scale"] = torch.tensor([4.0])
    stored = compressor.compress(tensors, scheme)
    want = compressor.decompress(stored, scheme)["weight"]
    path = tmp_path / "model.safetensors"
    save({f"a.{name}": tensor.contiguous() for name, tensor in stored.items()}, path)
    settings = {
        "format": f"{kind}-pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": args}},
    }
    found = read_compressed(settings, Tensors(SafetensorsWeights([path]), "m")).linears["a"]
    np.testing.assert_array_equal(found.dequantized(), want.float().numpy())


@pytest.mark.parametrize(
    ("make", "zero"),
    [(partial(written.packed, bits=4, group=32), 8), (partial(written.integers, bits=8), 0)],
)
def test_zero_points_of_symmetric_codes(
    source: Path, tmp_path: Path, make: Callable[..., Written], zero: int
) -> None:
    """Those that say nothing may be there."""
    made = make(source, tmp_path / "model", symmetric=False)
    config = json.loads((made.folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["symmetric"] = True
    change(made.folder, config_groups=groups)
    name = "model.layers.0.self_attn.q_proj"
    assert refusal(lambda: keep(made.folder, tmp_path / "other")) == (
        f"{made.folder}, {name}.weight_zero_point: got other zero points than {zero}, expected none of "
        "symmetric codes. Correct symmetric in the config."
    )
    middle = int.from_bytes(bytes([0x11 * zero] * 4), "little", signed=True)
    for layer in made.weights:
        damage(made.folder, f"{layer}.weight_zero_point", lambda array: np.full_like(array, middle))
    checkpoint, quant = keep(made.folder, tmp_path / "quant")
    want = checkpoint.array(f"{name}.weight")
    np.testing.assert_array_equal(quant.linear(name).dequantize(), want)


def test_an_order_that_is_missing(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model", ordered=True)
    damage(made.folder, f"{K}.g_idx", lambda array: None)
    assert refusal(lambda: open_checkpoint(str(made.folder), offline=True)) == (
        f"{made.folder}, {K}: got no g_idx, expected each input channel's group, as desc_act of the "
        "config says. The download is incomplete or damaged: download it again."
    )
    other = written.packed(source, tmp_path / "other", 4, 32, True, actorder=True)
    damage(other.folder, f"{K}.weight_g_idx", lambda array: None)
    assert refusal(lambda: open_checkpoint(str(other.folder), offline=True)) == (
        f"{other.folder}, {K}: got no weight_g_idx, expected each input channel's group, as actorder of "
        "the config says. The download is incomplete or damaged: download it again."
    )
    rows = written.gptq(source, tmp_path / "rows", group=-1, ordered=True)  # of one group
    damage(rows.folder, f"{K}.g_idx", lambda array: None)
    checkpoint = open_checkpoint(str(rows.folder), offline=True)
    np.testing.assert_array_equal(checkpoint.array(f"{K}.weight"), rows.weights[K])


@pytest.mark.parametrize(
    ("make", "tensor"),
    [
        (written.gptq, "qweight"),
        (written.awq, "qweight"),
        (partial(written.abq_llm, levels=16), "weight"),
        (partial(written.integers, bits=8), "weight"),
    ],
)
def test_tensors_of_no_numbers(
    source: Path, tmp_path: Path, make: Callable[..., Written], tensor: str
) -> None:
    made = make(source, tmp_path / "model")
    damage(made.folder, f"{K}.{tensor}", lambda array: array[:0])
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert found.startswith(f"{made.folder}, {K}.{tensor}: got shape [0, ")
    assert ", expected [above 0, above 0] by the config's bits and group size. " in found


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        (np.array([0, 64]), "0 x 64"),
        (np.array([np.nan, 64]), "nan x 64.0"),
        (np.array([-32, 64]), "-32 x 64"),
    ],
)
def test_shapes_that_are_none(source: Path, tmp_path: Path, shape: np.ndarray, got: str) -> None:
    made = written.packed(source, tmp_path / "model", 4, 32, True)
    damage(made.folder, f"{K}.weight_shape", lambda array: shape)
    assert refusal(lambda: open_checkpoint(str(made.folder), offline=True)) == (
        f"{made.folder}, {K}.weight_shape: got {got} weights, expected whole numbers above 0. {AGAIN}"
    )


@pytest.mark.parametrize("shape", [(4, 1), (0,)])
def test_one_scale_of_a_tensor_of_fp8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "model.safetensors"
    scale = np.ones(shape, np.float32)
    save_file({"a.weight": np.ones((4, 4), np.float32), "a.weight_scale_inv": scale}, path)
    assert refusal(lambda: read_fp8({}, Tensors(SafetensorsWeights([path]), "m"))) == (
        f"m, a.weight_scale_inv: got shape {list(shape)}, expected one number, because the config has "
        "no weight_block_size. Correct the config, or give the float model it was made from."
    )


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_a_group_size_counts_for_groups_alone(source: Path, tmp_path: Path, strategy: str) -> None:
    """-1 stands for channels in compressed-tensors."""
    made = written.packed(source, tmp_path / "model", 4, None, True)
    if strategy == "tensor":
        for layer in made.weights:
            damage(made.folder, f"{layer}.weight_scale", lambda array: array[0])
    config = json.loads((made.folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"] |= {"strategy": strategy, "group_size": -1}
    change(made.folder, config_groups=groups, sparsity_config={"format": "dense"})
    checkpoint, quant = keep(made.folder, tmp_path / "quant")
    for layer in made.weights:
        want = checkpoint.array(f"{layer}.weight")
        np.testing.assert_array_equal(quant.linear(layer).dequantize(), want)
        if strategy == "channel":
            np.testing.assert_array_equal(want, made.weights[layer])


def test_biases_of_zeros(tiny_llama: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    """AutoGPTQ has written one for every layer: those that the model lacks have no part in it."""
    made = written.gptq(source, tmp_path / "model", dynamic={"-:.*lm_head": {}})
    path = made.folder / "model.safetensors"
    tensors = load_file(path)
    biases = {
        f"{name}.bias": np.zeros(len(made.weights[name]), np.float16) for name in made.weights
    }
    save_file(tensors | biases, path)
    checkpoint, quant = keep(made.folder, tmp_path / "quant")
    np.testing.assert_array_equal(checkpoint.array(f"{K}.weight"), made.weights[K])
    assert quant.linear(K).arrays.bias is None
    biases[f"{K}.bias"][3] = 1
    save_file(tensors | biases, path)
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert f"got tensors the config does not ask for: {K}.bias. " in found
    own = tiny_llama(dtype="float16", architecture="Qwen2", num_hidden_layers=1)
    has = written.abq_llm(own, tmp_path / "has", 16)  # its biases are all zeros
    bias = open_checkpoint(str(has.folder), offline=True).array(f"{K}.bias")
    assert not bias.any() and len(bias) == len(has.weights[K])


def test_a_checkpoint_in_several_files(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model")
    folder = made.folder
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    # a layer's tensors in both
    of = {name: files[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if of[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": of}))
    _, quant = keep(folder, tmp_path / "quant")
    for layer, weight in made.weights.items():
        np.testing.assert_array_equal(quant.linear(layer).dequantize(), weight)

    def why() -> str:
        return refusal(lambda: open_checkpoint(str(folder), offline=True))

    index.write_text(json.dumps({"weight_map": dict.fromkeys(of, files[0])}))
    assert why().endswith(
        "expected it beside the layer's other tensors. The download is incomplete or damaged: "
        "download it again."
    )
    index.write_text(json.dumps({"weight_map": of | {f"{K}.qweight": "model-00003.safetensors"}}))
    assert why() == (
        f"{folder}: got 2 of the 3 weight files in {index.name}, missing model-00003.safetensors. The "
        "download is incomplete: fetch the missing files."
    )
    index.write_text(json.dumps({"weight_map": of}))
    again = load_file(folder / files[1]) | {f"{K}.qweight": tensors[f"{K}.qweight"]}
    save_file(again, folder / files[1])
    first = load_file(folder / files[0]) | {f"{K}.qweight": tensors[f"{K}.qweight"]}
    save_file(first, folder / files[0])
    assert why() == (
        f"{folder / files[1]}, tensor {K}.qweight: got it in {files[0]} too, expected each tensor in "
        "one file. Make the checkpoint again."
    )
    (folder / files[1]).unlink()
    assert why() == (
        f"{folder}: got 1 of the 2 weight files in {index.name}, missing {files[1]}. The download is "
        "incomplete: fetch the missing files."
    )


def test_experts_without_codes_are_named_by_layer(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_llama(dtype="float16", architecture="Mixtral", **FAMILIES["Mixtral"])
    made = written.gptq(source, tmp_path / "model", group=16)
    path = made.folder / "model.safetensors"
    gone = tuple(f"model.layers.1.block_sparse_moe.experts.{index}." for index in (1, 4))
    tensors = {name: one for name, one in load_file(path).items() if not name.startswith(gone)}
    save_file(tensors, path)
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert ", missing experts 1, 4 of layer 1. The download is incomplete" in found


def test_a_tied_model_with_codes_for_a_head_of_its_own(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    own = tiny_llama(dtype="float16", num_hidden_layers=1, tie_word_embeddings=False)
    made = written.gptq(own, tmp_path / "model", head=True)
    path = made.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    _, quant = keep(made.folder, tmp_path / "quant")
    assert quant.head is not None and not quant.decoder.tied
    found = quant.linear("lm_head").dequantize()
    np.testing.assert_array_equal(found, made.weights["lm_head"])


def test_zero_points_that_are_not_the_configs(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model", version=2)
    change(made.folder, checkpoint_format="gptq")
    q = "model.layers.0.self_attn.q_proj"
    assert refusal(lambda: keep(made.folder, tmp_path / "quant")) == (
        f"{made.folder}, {q}.qzeros: got zero points from 9 to 9 by checkpoint_format gptq, expected 8 "
        "of symmetric codes, which version 2 has in these tensors: the config's checkpoint_format is "
        "wrong. Correct checkpoint_format (gptq is version 1, gptq_v2 is version 2) or sym in the "
        "config."
    )


def test_linears_of_one_node_in_different_orders(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model", ordered=True)
    damage(made.folder, f"{K}.g_idx", lambda array: array[::-1].copy())
    found = refusal(lambda: keep(made.folder, tmp_path / "quant"))
    node = "model.layers.0.self_attn.qkv_proj"
    assert found == (
        f"{made.folder}, {node.replace('qkv', 'q')}, {node}: got linears with their input channels in "
        "different orders, expected one, because these linears are one GEMM node. --requantize "
        "rounds its weights again, with --wbits and --abits."
    )


def test_floats_among_codes(source: Path, tmp_path: Path) -> None:
    """A node without codes stays as it is; one that has some is refused."""
    made = written.gptq(source, tmp_path / "model", left_out=("down_proj", "q_proj", "k_proj"))
    mixed = "model.layers.0.self_attn.qkv_proj"
    assert refusal(lambda: keep(made.folder, tmp_path / "quant")) == (
        f"{made.folder}, {mixed}: got codes beside linears in floating point "
        "(model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj), expected either, because "
        "these linears are one GEMM node. --requantize rounds its weights again, with --wbits and "
        "--abits."
    )
    checkpoint = open_checkpoint(str(made.folder), offline=True)
    assert "expected --requantize" in refusal(lambda: check_quantized(checkpoint, False, False))
    made = written.gptq(source, tmp_path / "other", left_out=("down_proj", "o_proj"))
    checkpoint, quant = keep(made.folder, tmp_path / "kept")
    floats = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert [*quant.decoder.floats] == floats and not {*floats} & quant.decoder.linears.keys()
    for name in floats:
        weight = checkpoint.array(f"{name}.weight")
        np.testing.assert_array_equal(quant.tensor(f"{name}.weight"), weight)
    # Sizes and bits a weight are of all linears, whatever they are stored in.
    sizes = {name: math.prod(one.shape) for name, one in checkpoint.decoder.linears.items()}
    bits = sum(16 * size if name in floats else 5 * size for name, size in sizes.items())
    assert quant.sizes["linear_weights"] == sum(sizes.values())
    assert bits <= quant.sizes["linear_quant_bits"] < 1.1 * bits
    assert quant.label == "w4a16-g32-mixed"
    assert "expected --keep or" in refusal(lambda: check_quantized(checkpoint, False, False))
    formats.write("compressed-tensors", quant)
    _, again = keep(quant.path / "compressed-tensors", tmp_path / "again")
    assert again.decoder.floats == quant.decoder.floats
    config = json.loads((quant.path / "compressed-tensors/config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", *floats]


def test_a_head_with_codes_alone(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    own = tiny_llama(dtype="float16", num_hidden_layers=1, tie_word_embeddings=False)
    rest = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    made = written.gptq(own, tmp_path / "model", head=True, left_out=rest)
    assert refusal(lambda: keep(made.folder, tmp_path / "quant")) == (
        f"{made.folder}, model.layers.0.self_attn.q_proj: got weights without codes that an op takes, "
        "expected such for --keep. --requantize rounds its weights again, with --wbits and --abits."
    )


def test_codes_that_no_op_takes(wide: Path, tmp_path: Path) -> None:
    made = written.qqq(wide, tmp_path / "model", group=-1)
    assert refusal(lambda: keep(made.folder, tmp_path / "quant", abits=16)) == (
        "model.layers.0.self_attn.qkv_proj: got codes of w4a8 of QQQGemm, expected such as an op takes "
        "with 16 activation bits: QQQGemm got W4A16 with asymmetric activations, expected W4A8 with "
        "symmetric activations. Choose other --abits, or --requantize rounds its weights again, with "
        "--wbits and --abits."
    )


def test_groups_that_are_too_small(source: Path, tmp_path: Path) -> None:
    made = written.gptq(source, tmp_path / "model", group=8)
    assert refusal(lambda: keep(made.folder, tmp_path / "quant")) == (
        "model.layers.0.self_attn.qkv_proj: got codes in groups of 8 input channels, expected groups "
        "of at least 16. --requantize rounds its weights again, with --wbits and --abits."
    )


def test_linears_of_one_node_in_other_bits(source: Path, tmp_path: Path) -> None:
    """compressed-tensors may have v in 8 bits beside q and k in 4: all are said in 8."""
    made = written.packed(source, tmp_path / "model", 4, 32, True)
    other = written.packed(source, tmp_path / "other", 8, None, False)
    v = "model.layers.0.self_attn.v_proj"
    tensors = load_file(made.folder / "model.safetensors")
    more = load_file(other.folder / "model.safetensors")
    tensors |= {name: array for name, array in more.items() if name.startswith(f"{v}.")}
    save_file(tensors, made.folder / "model.safetensors")
    groups = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"][
            "group_0"
        ]
        for folder in (made.folder, other.folder)
    ]
    change(
        made.folder, config_groups={"a": groups[0], "b": groups[1] | {"targets": ["re:.*v_proj"]}}
    )
    _, quant = keep(made.folder, tmp_path / "quant")
    assert quant.scheme_of(v).label == "w8a16-g32" and quant.scheme.label == "w4a16-g32"
    for layer, weight in {**made.weights, v: other.weights[v]}.items():
        np.testing.assert_array_equal(quant.linear(layer).dequantize(), weight, layer)


def test_weights_that_were_not_rounded_on_these_scales(source: Path, tmp_path: Path) -> None:
    made = written.abq_llm(source, tmp_path / "model", 16)
    damage(made.folder, f"{K}.weight", put((3, 4), 0.0173))
    found = refusal(lambda: open_checkpoint(str(made.folder), offline=True))
    assert found.startswith(f"{made.folder}, {K}: got weights 0.") and found.endswith(
        "of a scale away from its multiples, and codes from 0, expected weights that were rounded on "
        f"these scales and zero points. {FLOAT}"
    )


def test_zero_points_between_codes(source: Path, tmp_path: Path) -> None:
    """Cut to whole numbers here and rounded there, weights would be a step off."""
    made = written.abq_llm(source, tmp_path / "model", 16)
    damage(made.folder, f"{K}.weight_quantizer.zeros", put((2, 0), 7.6))
    assert refusal(lambda: open_checkpoint(str(made.folder), offline=True)) == (
        f"{made.folder}, {K}.weight_quantizer.zeros: got the zero point 7.60156 and 1 such in all, "
        f"expected whole numbers. {FLOAT}"
    )
    damage(made.folder, f"{K}.weight_quantizer.zeros", lambda array: None)
    assert refusal(lambda: open_checkpoint(str(made.folder), offline=True)) == (
        f"{made.folder}, {K}: got no weight_quantizer.zeros, expected it beside the layer's other "
        "tensors. The download is incomplete or damaged: download it again."
    )


def test_what_a_quantized_checkpoint_is_asked_for(
    source: Path, tmp_path: Path, demo_gguf: Path
) -> None:
    made = written.gptq(source, tmp_path / "model")
    coded = open_checkpoint(str(made.folder), offline=True)
    assert check_quantized(coded, True, False) == check_quantized(coded, False, True) == ""
    assert refusal(lambda: check_quantized(coded, False, False)) == (
        f"{made.folder}: got a checkpoint that is quantized already (gptq), expected --keep or "
        "--requantize. --keep exports its own codes as they are, which is the better of the two for "
        "4 to 8 bits; --requantize rounds its weights again, with --wbits and --abits."
    )
    floats = open_checkpoint(str(source), offline=True)
    assert check_quantized(floats, False, False) == ""
    assert refusal(lambda: check_quantized(floats, True, False)) == (
        f"--keep: got a model of floats, {source}, expected a checkpoint that is quantized already. "
        "Leave it out and give --wbits and --abits."
    )
