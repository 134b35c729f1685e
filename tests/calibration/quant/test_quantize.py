"""The quant folder: what is in it, that it is the same every time, and what is refused before it is
written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.methods.rtn import quantize
from calibration.quant.checks import check_scheme
from calibration.quant.folder import read_quant
from calibration.quant.quantize import QuantizeOptions, quant_bytes, quantize_model
from calibration.quant.scheme import QuantScheme
from calibration.settings import CalibrationSettings
from plugins.errors import InputError

W4A8 = QuantScheme("ABQGemm", "rtn", 4, 8)
QQQ = QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True)


def _quantise(
    model: Path, folder: Path, scheme: QuantScheme = W4A8, **options: Any
) -> dict[str, Any]:
    folder.mkdir()
    return quantize_model(
        open_checkpoint(str(model), True), scheme, QuantizeOptions(**options), folder
    )


def _group(size: int, scheme: QuantScheme = W4A8) -> QuantScheme:
    return QuantScheme(scheme.op, "rtn", 4, 8, False, size, scheme.act_symmetric)


def test_tensors_are_those_of_the_method(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True, tie_word_embeddings=False)
    _quantise(model, tmp_path / "q")
    checkpoint = open_checkpoint(str(model), True)
    stored = load_file(tmp_path / "q" / "model-00001-of-00001.safetensors")
    for layer in range(2):
        for linear in checkpoint.decoder.blocks[layer].linears:
            name = f"model.layers.{layer}.{linear.name}"
            bias = checkpoint.array(f"{name}.bias") if "self_attn" in name else None
            arrays = quantize(checkpoint.array(f"{name}.weight"), bias, W4A8)
            np.testing.assert_array_equal(stored.pop(f"{name}.codes"), arrays.codes)
            np.testing.assert_array_equal(stored.pop(f"{name}.scale"), arrays.scale)
            np.testing.assert_array_equal(stored.pop(f"{name}.zero"), arrays.zero)
            if bias is not None:
                np.testing.assert_array_equal(stored.pop(f"{name}.bias"), bias)
    np.testing.assert_array_equal(stored.pop("rope.inv_freq"), checkpoint.rope()[0])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(stored.pop(name), checkpoint.array(name).astype(np.float16))
    norms = ("input_layernorm", "post_attention_layernorm")
    assert sorted(stored) == [
        f"model.layers.{layer}.{norm}.weight" for layer in (0, 1) for norm in norms
    ]


def test_tied_embeddings_stay_tied(tiny_quant: Callable[..., Path]) -> None:
    quant = read_quant(tiny_quant() / "quant")
    assert quant.config["tie_word_embeddings"] is True and not quant.has("lm_head.weight")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_input_gives_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    _quantise(tiny_model_dir, tmp_path / "a")
    copy = tmp_path / "elsewhere" / tiny_model_dir.name
    copy.mkdir(parents=True)
    for path in tiny_model_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    _quantise(copy, tmp_path / "b")
    first, second = _bytes(tmp_path / "a"), _bytes(tmp_path / "b")
    assert list(first) == [
        "model-00001-of-00001.safetensors",
        "quant.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_further_chat_templates_come_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "additional_chat_templates").mkdir()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    _quantise(model, tmp_path / "q")
    template = tmp_path / "q" / "additional_chat_templates" / "tool_use.jinja"
    assert template.read_text() == "{{ tools }}"
    assert read_quant(tmp_path / "q").tokenizer().chat_template["tool_use"] == "{{ tools }}"
    template.write_text("{{ other }}")
    with pytest.raises(InputError, match=r"tool_use.jinja: got SHA-256"):
        read_quant(tmp_path / "q").tokenizer()


def test_a_local_model_needs_no_network(
    tiny_model_dir: Path, tmp_path: Path, no_network: None
) -> None:
    _quantise(tiny_model_dir, tmp_path / "q")
    assert read_quant(tmp_path / "q").tokenizer()("bread")["input_ids"]


def test_source_shards_and_types_do_not_change_the_result(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    _quantise(tiny_llama(), tmp_path / "a")
    _quantise(tiny_llama(shard_size="100KB"), tmp_path / "b")
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_hold_the_same_tensors(tiny_model_dir: Path, tmp_path: Path) -> None:
    _quantise(tiny_model_dir, tmp_path / "one")
    _quantise(tiny_model_dir, tmp_path / "many", shard_bytes=40_000)
    one, many = read_quant(tmp_path / "one"), read_quant(tmp_path / "many")
    shards = [name for name in many.files if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for name in load_file(tmp_path / "one" / "model-00001-of-00001.safetensors"):
        np.testing.assert_array_equal(one.tensor(name), many.tensor(name))


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (W4A8, 4),
        (QQQ, 4),
        (_group(64, QQQ), 4),
        (QuantScheme("ABQGemm", "rtn", 2, 8, True), 3),
    ],
    ids=str,
)
def test_sizes_count_codes_scales_and_zeros(
    tiny_model_dir: Path, tmp_path: Path, scheme: QuantScheme, bits: float
) -> None:
    facts = _quantise(tiny_model_dir, tmp_path / "q", scheme)
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # outputs of the seven linears of two layers
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    groups = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 2 * 64)
    extra = (
        rows * 64
        if scheme.op == "ABQGemm"
        else rows * 32 + (groups * 16 if scheme.group_size else 0)
    )
    assert facts["linear_weights"] == weights
    assert facts["linear_quant_bits"] == weights * bits + extra
    assert facts["bits_per_weight"] == round(facts["linear_quant_bits"] / weights, 4)
    assert facts["linear_float_bytes"] == weights * 2
    assert facts["rest_bytes"] == 2 * (512 * 64 + 5 * 64) + 8 * 4
    assert facts["summary"] == (
        f"{facts['bits_per_weight']:.2f} bits per weight, "
        f"{facts['model_float_bytes'] / 1e6:.0f} -> {facts['model_quant_bytes'] / 1e6:.0f} MB"
    )


def test_quant_json(tiny_model_dir: Path, tmp_path: Path) -> None:
    _quantise(tiny_model_dir, tmp_path / "q")
    meta = json.loads((tmp_path / "q" / "quant.json").read_text())
    assert meta["format"] == 1 and meta["family"] == "llama" and meta["scheme"] == W4A8.as_dict()
    config = meta["config"]
    expected = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_attention_scaling": 1.0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["hf"]["model_type"] == "llama"
    checkpoint = open_checkpoint(str(tiny_model_dir), True)
    assert meta["source"] == {
        "name": checkpoint.name,
        "kind": "folder",
        "hub_id": "",
        "fingerprint": checkpoint.fingerprint,
    }
    size = sum(path.stat().st_size for path in (tmp_path / "q").iterdir())
    assert size < quant_bytes(checkpoint, W4A8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_types_of_the_rest(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    _quantise(tiny_model_dir, tmp_path / "q", QuantScheme("ABQGemm", "rtn", 4, 8, dtype=dtype))
    stored = load_torch(tmp_path / "q" / "model-00001-of-00001.safetensors")
    wanted = (
        open_checkpoint(str(tiny_model_dir), True)
        .tensor("model.norm.weight")
        .to(getattr(torch, dtype))
    )
    assert torch.equal(stored["model.norm.weight"], wanted)


def test_notes_of_the_progress(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[tuple[object, ...]] = []

        def start(self, stage: str, total: int) -> None:
            self.calls.append((stage, total))

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.calls.append((steps, note))

        def finish(self) -> None:
            self.calls.append(("finish",))

        def message(self, text: str) -> None:
            self.calls.append((text,))

    recorder = Recorder()
    quantize_model(
        open_checkpoint(str(tiny_model_dir), True), W4A8, QuantizeOptions(), tmp_path, recorder
    )
    items = 3 + 2 * 9  # embedding, final norm, frequencies; two norms and seven linears per layer
    assert recorder.calls[0] == ("quant", items) and recorder.calls[-1] == ("finish",)
    assert len(recorder.calls) == items + 2 and recorder.calls[4] == (
        1,
        "model.layers.0.self_attn.q_proj",
    )


# ---------------------------------------------------------------- refusals


def _refusal(model: Path, scheme: QuantScheme) -> str:
    with pytest.raises(InputError) as caught:
        check_scheme(open_checkpoint(str(model), True), scheme)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_group_size_that_does_not_divide(tiny_model_dir: Path) -> None:
    assert _refusal(tiny_model_dir, _group(48)) == (
        "--group-size: got 48, which does not divide the in_features 64, 128 of this model's "
        "linear layers. "
        "Use --group-size 0 (one scale per output channel) or 16, 32, 64."
    )
    assert _refusal(tiny_model_dir, _group(128)) == (
        "--group-size: got 128, which does not divide the in_features 64 of this model's linear layers. "
        "Use --group-size 0 (one scale per output channel) or 16, 32, 64."
    )


@pytest.mark.parametrize("size", [-1, 1, 8])
def test_group_size_too_small(tiny_model_dir: Path, size: int) -> None:
    assert _refusal(tiny_model_dir, _group(size)) == (
        f"--group-size: got {size}, expected 0 or at least 16. Use --group-size 0 (one scale "
        f"per output channel) or 16, 32, "
        "64."
    )


def test_group_size_of_qqq(tiny_model_dir: Path) -> None:
    assert _refusal(tiny_model_dir, _group(32, QQQ)) == (
        "QQQGemm: got group size 32, expected 0, 64 or 128. Use one of these, or --method abq."
    )
    assert _refusal(tiny_model_dir, _group(128, QQQ)) == (
        "--group-size: got 128, which does not divide the in_features 64 of this model's linear layers. "
        "Use --group-size 0 (one scale per output channel) or 64."
    )


@pytest.mark.parametrize(
    ("scheme", "got"),
    [
        (QuantScheme("QQQGemm", "rtn", 4, 4, act_symmetric=True), "W4A4"),
        (QuantScheme("QQQGemm", "rtn", 2, 8, True, act_symmetric=True), "W2*A8"),
        (QuantScheme("QQQGemm", "rtn", 4, 8), "W4A8 with asymmetric activations"),
    ],
)
def test_qqq_is_w4a8_only(tiny_model_dir: Path, scheme: QuantScheme, got: str) -> None:
    assert _refusal(tiny_model_dir, scheme) == (
        f"QQQGemm: got {got}, expected W4A8 with symmetric activations. "
        "Use --wbits 4 --abits 8, or --method abq for other bits."
    )


def test_bits_out_of_range(tiny_model_dir: Path) -> None:
    assert _refusal(tiny_model_dir, QuantScheme("ABQGemm", "rtn", 4, 9)) == (
        "ABQGemm: got 9 activation bits, expected 2 to 8, or 16 for weight-only. "
        "Choose other --abits."
    )


def _with_weight(model: Path, folder: Path, name: str, value: float) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_torch(folder / "model.safetensors")
    tensors[name].reshape(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nan_in_a_linear_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = _with_weight(
        tiny_model_dir, tmp_path / "m", "model.layers.1.self_attn.v_proj.weight", float("nan")
    )
    with pytest.raises(InputError) as caught:
        _quantise(model, tmp_path / "q")
    assert str(caught.value) == (
        f"{model}, tensor model.layers.1.self_attn.v_proj.weight: got nan at [0, 5], expected "
        "finite numbers. "
        "The weights are damaged: download or train them again."
    )


def test_norm_that_does_not_fit_float16(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = _with_weight(tiny_model_dir, tmp_path / "m", "model.norm.weight", 1e5)
    with pytest.raises(InputError) as caught:
        _quantise(model, tmp_path / "q")
    assert str(caught.value) == (
        f"{model}, tensor model.norm.weight: got 100000, expected at most 65504 to fit float16. "
        "Use --dtype bfloat16 or float32."
    )
    _quantise(model, tmp_path / "bf16", QuantScheme("ABQGemm", "rtn", 4, 8, dtype="bfloat16"))


def test_calibration_text_is_checked_even_for_a_method_that_does_not_read_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "empty.txt"
    text.write_text("\n")
    with pytest.raises(InputError) as caught:
        _quantise(tiny_model_dir, tmp_path / "q", settings=CalibrationSettings(calib=str(text)))
    assert (
        str(caught.value)
        == f"--calib: got {text} with no text in it. Give a file with at least a few thousand words."
    )
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.slow
def test_demo_model_quantises_within_bounds(demo_gguf: Path, tmp_path: Path) -> None:
    facts = _quantise(demo_gguf, tmp_path / "q", _group(64, QQQ))
    assert facts["linear_weights"] == 106_168_320
    assert 4.25 < facts["bits_per_weight"] < 4.35
    quant = read_quant(tmp_path / "q")
    weight = open_checkpoint(str(demo_gguf), True).array("model.layers.7.mlp.down_proj.weight")
    error = quant.linear("model.layers.7.mlp.down_proj").dequantize() - weight
    assert 10 * np.log10(np.square(weight).mean() / np.square(error).mean()) > 17  # dB
