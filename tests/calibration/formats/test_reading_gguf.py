"""GGUF files whose codes are kept: what the package gguf dequantizes, to the bit, also where the
linears of a GEMM node have different types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from calibration.checkpoints.checkpoint import Checkpoint, open_checkpoint
from calibration.quant.folder import read_quant
from calibration.quant.keep import Keeping, check_quantized, kept_schemes
from calibration.reference.model import float_model
from plugins.errors import InputError
from tests.calibration.checkpoints.gguf_files import write_gguf
from tests.exporter.graph_cases import Decoder, export, feeds

# Bytes of a block where its fp16 scale is, and its minimum, or the scale of the groups' minimums.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "MXFP4": (),
}  # fmt: skip
MIXED = {
    "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q2_K",
    "ffn_gate": "Q5_K", "ffn_up": "Q3_K", "ffn_down": "Q8_0", "token_embd": "Q6_K",
}  # fmt: skip
IDS = np.array([[5, 300, 17, 42, 99, 7, 256, 3, 444, 12, 13]], np.int64)


@pytest.fixture(scope="module")
def original(tiny_llama: Callable[..., Path]) -> Checkpoint:
    """Super-blocks have 256 weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    return open_checkpoint(str(tiny_llama(**sizes)), offline=True)


def file_of(original: Checkpoint, types: Mapping[str, str], path: Path, **options: int) -> Path:
    """The model with blocks of random bytes in the place of these tensors."""
    rng, blocks = np.random.default_rng(3), dict[str, tuple[str, np.ndarray]]()
    for info in original.decoder.tensors():
        name = info.gguf.removesuffix(".weight").rpartition(".")[2]
        if name not in types:
            continue
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[types[name]]]
        rows, columns = info.shape
        data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        for byte in HALVES[types[name]]:
            coarse = 4e-3 if types[name] in ("Q4_0", "Q4_1", "Q8_0") else 1e-4
            half = rng.uniform(coarse / 2, coarse, (*data.shape[:2], 1)).astype(np.float16)
            data[..., byte : byte + 2] = half.view(np.uint8)
        if types[name] == "MXFP4":  # powers of two
            data[..., 0] = rng.integers(115, 120, data.shape[:2])
        data = data.reshape(rows, -1)
        if info.expert is not None:  # stacked
            _, others = blocks.get(info.gguf, ("", data[None][:0]))
            data = np.concatenate([others, data[None]])
        blocks[info.gguf] = types[name], data
    return write_gguf(path, original, blocks=blocks, **options)


def check_logits(folder: Path, checkpoint: Checkpoint) -> None:
    """The exported graph predicts what transformers does with the dequantized checkpoint."""
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    with torch.no_grad():
        want = float_model(checkpoint)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("types", "schemes"),
    [
        (dict.fromkeys(MIXED, "Q4_0"), ["w4a16-g32", "w4a16-g32", "w4a16-g32", "w4a16-g32"]),
        (dict.fromkeys(MIXED, "Q4_1"), ["w4a16-g32 min", *3 * ["w4a16-g32 min"]]),
        (dict.fromkeys(MIXED, "MXFP4"), 4 * ["w5a16-g32"]),
        (MIXED, ["w6a16-g16 min", "w2a16-g16 min", "w5a16-g16 min", "w8a16-g32"]),
    ],
    ids=["Q4_0", "Q4_1", "MXFP4", "mixed"],
)
def test_codes_stay(
    original: Checkpoint, tmp_path: Path, types: dict[str, str], schemes: list[str]
) -> None:
    checkpoint = open_checkpoint(str(file_of(original, types, tmp_path / "m.gguf")), offline=True)
    found = kept_schemes(checkpoint, Keeping(dtype="float32"))
    folder = export(tmp_path / "m.gguf", found, tmp_path)
    quant = read_quant(tmp_path / "quant")
    said = [quant.scheme_of(node) for node in quant.decoder.nodes[:-1]]
    assert [one.label + one.has_minimum * " min" for one in said] == schemes
    assert quant.head is not None and quant.head.method == "kept"  # the table's own codes
    for layer in quant.decoder.linears:
        table = checkpoint.decoder.head_table() if layer == "lm_head" else layer
        want, got = checkpoint.array(f"{table}.weight"), quant.linear(layer).dequantize()
        np.testing.assert_array_equal(got, want, layer)
    check_logits(folder, checkpoint)


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
def test_codes_of_experts_stay(
    tiny_llama: Callable[..., Path], tmp_path: Path, architecture: str, unstacked: bool
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    more = {"norm_topk_prob": True} if architecture == "Qwen3Moe" else {}
    model = tiny_llama(architecture=architecture, **sizes, **experts, **more)
    types = {"attn_q": "Q8_0", "attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q4_0"}
    types |= {"ffn_gate_exps": "Q4_0", "ffn_up_exps": "Q4_1", "ffn_down_exps": "Q8_0"}
    original = open_checkpoint(str(model), offline=True)
    path = file_of(original, types, tmp_path / "m.gguf", unstacked=unstacked)
    checkpoint = open_checkpoint(str(path), offline=True)
    folder = export(path, kept_schemes(checkpoint, Keeping(dtype="float32")), tmp_path)
    quant = read_quant(tmp_path / "quant")
    routed = [node for node in quant.decoder.nodes if node in quant.decoder.routed]
    said = [quant.scheme_of(node) for node in routed]
    assert [one.label for one in said] == 4 * ["w4a16-g32", "w8a16-g32"]
    for layer in quant.decoder.linears:
        want, got = checkpoint.array(f"{layer}.weight"), quant.linear(layer).dequantize()
        np.testing.assert_array_equal(got, want, layer)
    check_logits(folder, checkpoint)


def test_floats_among_codes(original: Checkpoint, tmp_path: Path) -> None:
    types = {name: kind for name, kind in MIXED.items() if name not in ("attn_output", "ffn_down")}
    checkpoint = open_checkpoint(str(file_of(original, types, tmp_path / "m.gguf")), offline=True)
    floats = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
    assert kept_schemes(checkpoint, Keeping()).floats == floats
    assert "--keep instead of --wbits" in check_quantized(checkpoint, False, False)


def test_codes_of_a_set_of_files(original: Checkpoint, tmp_path: Path) -> None:
    """The parts of gguf-split are one model, whichever is named."""
    types = dict.fromkeys(MIXED, "Q4_1")
    whole = open_checkpoint(str(file_of(original, types, tmp_path / "w.gguf")), offline=True)
    file_of(original, types, tmp_path / "m.gguf", split_max_tensors=4)
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) == 3
    found = open_checkpoint(str(parts[1]), offline=True)
    assert kept_schemes(found, Keeping()) == kept_schemes(whole, Keeping())
    for layer in found.decoder.linears:
        codes = [one.coded(layer) for one in (found, whole)]
        assert codes[0] is not None and codes[1] is not None
        one, other = (each.read().named() for each in codes if each)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_blocks_of_zeros(original: Checkpoint, tmp_path: Path) -> None:
    """A block of nothing but zeros has the scale 0, or -0, whatever its codes."""
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (512, 8, 18), dtype=np.uint8)
    half = rng.uniform(-4e-3, 4e-3, (512, 8, 1)).astype(np.float16)
    half[:5], half[7, 3], half[8, 2] = 0, 0, -0.0
    data[..., :2] = half.view(np.uint8)
    path, name = tmp_path / "m.gguf", "model.layers.0.mlp.up_proj"
    raw = {"blk.0.ffn_up.weight": ("Q4_0", data.reshape(512, -1))}
    others = {
        info.gguf: ("Q4_0", np.zeros((info.shape[0], info.shape[1] // 32 * 18), np.uint8))
        for info in original.decoder.tensors()
        if info.gguf.startswith("blk.") and len(info.shape) == 2
    }
    write_gguf(path, original, blocks=others | raw)
    checkpoint = open_checkpoint(str(path), offline=True)
    folder = export(path, kept_schemes(checkpoint, Keeping(dtype="float32")), tmp_path)
    want = checkpoint.array(f"{name}.weight")
    assert not want[:5].any() and not want[7, 96:128].any() and want[7, :96].any()
    got = read_quant(tmp_path / "quant").linear(name).dequantize()
    np.testing.assert_array_equal(got, want)
    decoder = Decoder(folder)
    logits, _ = decoder(feeds(IDS, decoder.empty()))
    assert np.isfinite(logits).all()


def test_a_file_without_codes_and_one_with_others(original: Checkpoint, tmp_path: Path) -> None:
    floats = open_checkpoint(str(write_gguf(tmp_path / "f.gguf", original)), offline=True)
    assert floats.format == check_quantized(floats, False, False) == ""
    types = dict.fromkeys(MIXED, "IQ4_NL")
    path = file_of(original, types, tmp_path / "i.gguf")
    coded = file_of(original, MIXED, tmp_path / "m.gguf")
    assert check_quantized(open_checkpoint(str(coded), offline=True), False, False) == (
        "The model's weights are quantized already, and are rounded once more here. --keep instead "
        "of --wbits exports its own codes as they are, which is faster and nearer to it."
    )
    others = open_checkpoint(str(path), offline=True)
    assert check_quantized(others, False, False) == ""
    with pytest.raises(InputError) as caught:
        kept_schemes(others, Keeping())
    assert str(caught.value) == (
        f"{path}, tensor blk.0.attn_q.weight: got type IQ4_NL, whose numbers are no scale * code + "
        "minimum, expected one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, MXFP4, "
        "NVFP4. Quantize its float numbers anew: --requantize."
    )
