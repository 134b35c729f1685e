"""Codes out of GGUF blocks: random bytes as the package gguf dequantizes them, to the bit, and every
refusal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from calibration.checkpoints import gguf_codes
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.checkpoints.gguf import GgufFile, GgufWeights
from calibration.checkpoints.gguf_codes import (
    Codes,
    CodesForm,
    form_of,
    read_codes,
    types_with_codes,
)
from calibration.checkpoints.gguf_header import GgufPart, GgufTensor
from plugins import op_spec
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.errors import InputError

FORMS = {
    "Q4_0": (4, 32, 8),
    "Q4_1": (4, 32, None),
    "Q5_0": (5, 32, 16),
    "Q5_1": (5, 32, None),
    "Q8_0": (8, 32, 128),
    "Q2_K": (2, 16, None),
    "Q3_K": (3, 16, 4),
    "Q4_K": (4, 32, None),
    "Q5_K": (5, 32, None),
    "Q6_K": (6, 16, 32),
    "MXFP4": (5, 32, 12),
    "NVFP4": (5, 16, 12),
}
# Bytes of a block where its fp16 scale is, and its minimum or the scale of the groups' minimums.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "MXFP4": (), "NVFP4": (),
}  # fmt: skip


def random_tensor(name: str, rows: int = 19, blocks: int = 3) -> GgufTensor:
    """Any bytes, scales of any size and sign, subnormal ones and zeros too, but finite."""
    kind, rng = GGMLQuantizationType[name], np.random.default_rng(7)
    block, size = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for byte in HALVES[name]:
        half = rng.integers(0, 1 << 16, (rows, blocks, 1), dtype=np.uint16)
        half[half & 0x7C00 == 0x7C00] ^= 0x4000
        half[0] = [[0], [0x8000], [1]]
        data[..., byte : byte + 2] = half.view(np.uint8)
    return GgufTensor(kind, (rows, blocks * block), data.reshape(rows, -1))


def arrays_of(codes: Codes) -> QuantArrays:
    zero = None if codes.zero is None else np.full(codes.scale.shape, codes.zero, np.int32)
    return QuantArrays(codes.codes, codes.scale, zero, minimum=codes.minimum)


def attributes_of(codes: Codes) -> GemmAttributes:
    rows, columns = codes.codes.shape
    scheme = codes.bits, 1 << codes.bits, 8, 0, codes.group, columns, rows, 0
    return GemmAttributes(*scheme, has_minimum=int(codes.minimum is not None))


def assert_exact(codes: Codes, want: np.ndarray) -> None:
    """The op packs the codes, and they stand for these very numbers."""
    spec, attrs = op_spec("ABQGemm"), attributes_of(codes)
    back = spec.unpack(spec.pack(arrays_of(codes), attrs, "test"), attrs)
    got = spec.dequantize(back, attrs)
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_which_types_there_are() -> None:
    assert sorted(types_with_codes()) == sorted(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_codes_stand_for_what_gguf_dequantizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(name)
    monkeypatch.setattr(gguf_codes, "_SLAB", 4 * tensor.shape[1])  # slabs, the last cut short
    codes, form = read_codes("tensor", tensor), form_of("tensor", tensor)
    assert (codes.bits, codes.group, codes.zero) == FORMS[name]
    assert (form.bits, form.group, form.zero) == FORMS[name]
    assert (codes.minimum is None) is (codes.zero is not None)
    assert codes.codes.max() == (24 if name.endswith("FP4") else (1 << codes.bits) - 1)
    assert_exact(codes, dequantize(tensor.data, tensor.type))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_of_floats_of_4_bits(name: str) -> None:
    tensor = random_tensor(name, rows=256, blocks=1)
    size = GGML_QUANT_SIZES[tensor.type][1]
    tensor.data.reshape(256, size)[:, : 4 if name == "NVFP4" else 1] = np.arange(256)[:, None]
    with np.errstate(over="ignore"):  # the largest scale of MXFP4 makes infinities
        assert_exact(read_codes("tensor", tensor), dequantize(tensor.data, tensor.type))


def test_some_rows_are_those_of_all() -> None:
    tensor = random_tensor("Q4_K")
    whole = read_codes("tensor", tensor)
    some = read_codes("tensor", replace(tensor, data=tensor.data[5:9]))
    np.testing.assert_array_equal(some.codes, whole.codes[5:9])
    np.testing.assert_array_equal(some.scale, whole.scale[5:9])


def test_the_least_int8_code_is_kept() -> None:
    """Q8_0 quantizes to -127 .. 127, but its bytes may hold -128."""
    tensor = random_tensor("Q8_0", rows=1, blocks=3)
    tensor.data[0, 2:34] = 128
    codes = read_codes("tensor", tensor)
    assert codes.codes[0, :32].tolist() == [0] * 32
    assert_exact(codes, dequantize(tensor.data, tensor.type))


@pytest.mark.parametrize("name", ["F16", "BF16", "IQ4_NL", "TQ1_0", "IQ2_XS"])
def test_other_types_are_refused(name: str) -> None:
    tensor = GgufTensor(GGMLQuantizationType[name], (1, 256), np.zeros((1, 1), np.uint8))
    for read in (form_of, read_codes):
        with pytest.raises(InputError) as error:
            read("model.gguf, tensor blk.0.attn_q.weight", tensor)
        assert str(error.value) == (
            f"model.gguf, tensor blk.0.attn_q.weight: got type {name}, whose numbers are no scale * "
            "code + minimum, expected one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, "
            "Q6_K, MXFP4, NVFP4. Quantize its float numbers anew: --requantize."
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "place"), [("Q4_1", 0), ("Q4_1", 1), ("Q6_K", 0), ("Q2_K", 1)])
def test_scales_that_are_not_finite_are_refused(name: str, place: int, bad: float) -> None:
    tensor = random_tensor(name)
    size, byte = GGML_QUANT_SIZES[tensor.type][1], HALVES[name][place]
    blocks = tensor.data.reshape(19, 3, size)
    blocks[11, 2, byte : byte + 2] = blocks[12, 0, byte : byte + 2] = np.frombuffer(
        np.float16(bad).tobytes(), np.uint8
    )
    with pytest.raises(InputError) as error:
        read_codes("model.gguf, tensor a", tensor)
    assert str(error.value) == (
        f"model.gguf, tensor a: got the scale {bad} in block 2 of row 11 and 2 such in all, expected "
        "finite numbers. The file is truncated or damaged: download it again."
    )


def test_the_demo_model(demo_gguf: Path) -> None:
    """A real file: its linears are Q4_1, its embedding is Q8_0."""
    tensors = GgufPart(demo_gguf).tensors.items()
    quantized = {name: tensor for name, tensor in tensors if tensor.type.name in FORMS}
    assert quantized.pop("token_embd.weight").type.name == "Q8_0"
    assert len(quantized) == 30 * 7 and {one.type.name for one in quantized.values()} == {"Q4_1"}
    for tensor in quantized.values():
        rows = replace(tensor, data=tensor.data[:16])
        assert_exact(read_codes("tensor", rows), dequantize(rows.data, rows.type))


def test_rows_are_in_the_order_of_the_hugging_face_model(demo_gguf: Path) -> None:
    """Those that RoPE rotates too, as a whole and in part."""
    decoder = open_checkpoint(str(demo_gguf), offline=True).decoder
    weights = GgufWeights(GgufFile(demo_gguf), decoder)
    for linear in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.3.self_attn.{linear}.weight"
        assert weights.codes_form(name) == CodesForm(4, 32, None)
        whole = weights.array(name)
        for rows in (None, slice(100, 131)):
            assert_exact(weights.codes(name, rows), whole if rows is None else whole[rows])
