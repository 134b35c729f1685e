"""The compressed-tensors folder: transformers opens it and finds our weights and logits in it; what
it cannot say is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration import formats
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.formats.compressed_tensors import NAME, check, pack_words
from calibration.quant.folder import QuantModel, read_quant
from calibration.quant.quantize import QuantizeOptions, quant_bytes, quantize_model
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.reference.model import quantised_model
from plugins.errors import InputError
from tests.calibration.block_cases import calibrate_tiny
from tests.conftest import FAMILIES

TOKENS = torch.arange(48)[None] * 7 % 500
SCHEMES: list[dict[str, Any]] = [
    {},
    {"act_symmetric": True},
    {"group_size": 32},
    {"wbits": 8},
    {"wbits": 8, "group_size": 16},
    {"abits": 16},
    {"abits": 16, "group_size": 16},
    {"wbits": 8, "abits": 16},
    {"op": "QQQGemm"},
    {"op": "QQQGemm", "group_size": 64},
]
EXPECTED = "expected W4A8, W8A8, W4A16 or W8A16. Use such bits, or leave out --format."


def _copy(out: Path, tmp_path: Path) -> QuantModel:
    return read_quant(shutil.copytree(out / "quant", tmp_path / "quant"))


def _written(quant: QuantModel) -> Path:
    formats.write(NAME, quant)
    return quant.path / NAME


def _opened(folder: Path) -> Any:
    """As a user of transformers opens it, in fp32. Packed weights with zero points take
    `dequantize` (see docs/quant_format.md).
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = (
        json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
        == "pack-quantized"
    )
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.requires_grad_(False)


def _logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(TOKENS).logits)


def _assert_same_weights(model: Any, quant: QuantModel) -> None:
    """Of every quantised linear, bit for bit, after a forward pass: compressed-tensors dequantises
    in it.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and quant.has(f"{name}.codes")
    ]
    assert len(names) == 14
    for name in names:
        np.testing.assert_array_equal(
            model.get_submodule(name).weight.numpy(), quant.linear(name).dequantize(), err_msg=name
        )


@pytest.mark.parametrize("fields", SCHEMES, ids=str)
def test_transformers_finds_our_weights_and_logits(
    tiny_quant: Callable[..., Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    quant = _copy(tiny_quant(**fields), tmp_path)
    model = _opened(_written(quant))
    theirs, ours = _logits(model), _logits(quantised_model(quant, round_activations=False))
    _assert_same_weights(model, quant)
    scheme, quant.scheme = quant.scheme, replace(quant.scheme, abits=16)
    noise = np.linalg.norm(
        ours - _logits(quantised_model(quant, round_activations=False))
    )  # what 8-bit activations change
    distance = np.linalg.norm(theirs - ours)
    if scheme.abits == 16:
        assert distance <= 1e-6 * np.linalg.norm(ours)
    # steps of max / 127.5 against ours of max / 127: two roundings, sqrt(2) apart if they were
    # independent
    elif scheme.act_symmetric:
        assert 0 < distance <= 1.5 * noise
    else:  # the same steps; a value on the edge between two codes may fall on either side
        assert distance <= 0.1 * noise and noise > 0


def test_untied_head_biases_shards_and_tokenizer(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(
        str(tiny_llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)), True
    )
    (tmp_path / "quant").mkdir()
    scheme = QuantScheme("ABQGemm", "rtn", 8, 8, dtype="float32")
    quantize_model(
        checkpoint, scheme, QuantizeOptions(shard_bytes=60_000, format=NAME), tmp_path / "quant"
    )
    quant, folder = read_quant(tmp_path / "quant"), tmp_path / "quant" / NAME
    assert not any(NAME in name for name in quant.files)  # and read_quant has checked those
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted({*index["weight_map"].values()})
    assert shards == sorted(path.name for path in folder.glob("*.safetensors"))
    assert (
        len(shards) == sum(name.endswith(".safetensors") for name in quant.files) - 1 > 2
    )  # the last has only rope.inv_freq
    model = _opened(folder)
    _logits(model)
    _assert_same_weights(model, quant)
    state = model.state_dict()
    rest = [name for name in state if quant.has(name)]
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.bias",
    } <= {*rest}
    assert len(rest) == 3 + 2 * (2 + 7)
    for name in rest:
        np.testing.assert_array_equal(state[name].numpy(), quant.tensor(name), err_msg=name)
    text = "Bread is flour, water, salt and time."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sum(
        path.stat().st_size for path in (tmp_path / "quant").rglob("*") if path.is_file()
    ) < quant_bytes(checkpoint, scheme, NAME)


@pytest.mark.parametrize("group_size", ["0", "64"])
def test_a_calibrated_model_with_its_negative_scales_and_its_own_head(
    tiny_model_dir: Path, tmp_path: Path, group_size: str
) -> None:
    assert (
        calibrate_tiny(
            tiny_model_dir,
            tmp_path,
            "--format",
            NAME,
            "--dtype",
            "float32",
            "--group-size",
            group_size,
        )
        == 0
    )
    quant = read_quant(tmp_path / "quant")
    arrays = quant.linear("model.layers.0.self_attn.o_proj").arrays
    assert ((arrays.scale if arrays.scale_group is None else arrays.scale_group) < 0).any()
    model = _opened(tmp_path / "quant" / NAME)
    theirs, ours = _logits(model), _logits(quantised_model(quant, round_activations=False))
    _assert_same_weights(model, quant)
    assert np.linalg.norm(theirs - ours) < 0.1 * np.linalg.norm(
        ours
    )  # their activation codes are others
    assert not np.array_equal(model.lm_head.weight.numpy(), model.model.embed_tokens.weight.numpy())


def _mix(quant: QuantModel, other: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the down_proj layers from another model."""
    own = quant.linear
    monkeypatch.setattr(
        quant, "linear", lambda name: (other.linear if "down_proj" in name else own)(name)
    )


def test_layers_of_different_schemes(
    tiny_quant: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = _copy(tiny_quant(), tmp_path)
    _mix(quant, read_quant(tiny_quant(wbits=8, group_size=32) / "quant"), monkeypatch)
    folder = _written(quant)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    found = [
        (group["weights"]["num_bits"], group["weights"]["group_size"], len(group["targets"]))
        for group in config["config_groups"].values()
    ]
    assert found == [(4, None, 12), (8, 32, 2)]
    model = _opened(folder)
    _logits(model)
    _assert_same_weights(model, quant)


def test_config_of_two_formats(
    tiny_quant: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = _copy(tiny_quant(op="QQQGemm", group_size=64), tmp_path)
    _mix(quant, read_quant(tiny_quant(abits=16) / "quant"), monkeypatch)
    config = json.loads((_written(quant) / "config.json").read_text())
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    others = list(quant.decoder.linears)
    integers = {"type": "int", "group_size": None}
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float16")
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "format": "int-quantized",
                "targets": [name for name in others if name not in down],
                "output_activations": None,
                "weights": {
                    **integers,
                    "num_bits": 8,
                    "symmetric": True,
                    "dynamic": False,
                    "strategy": "channel",
                },
                "input_activations": {
                    **integers,
                    "num_bits": 8,
                    "symmetric": True,
                    "dynamic": True,
                    "strategy": "token",
                },
            },
            "group_1": {
                "format": "pack-quantized",
                "targets": down,
                "output_activations": None,
                "input_activations": None,
                "weights": {
                    **integers,
                    "num_bits": 4,
                    "symmetric": False,
                    "dynamic": False,
                    "strategy": "channel",
                },
            },
        },
    }


def test_packed_words() -> None:
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [15, 0, 0, 0, 0, 0, 0, 15, 1]], np.uint8)
    np.testing.assert_array_equal(
        pack_words(codes, 4).view(np.uint32), [[0x87654321, 9], [0xF000000F, 1]]
    )
    np.testing.assert_array_equal(
        pack_words(codes[:, :5], 8).view(np.uint32), [[0x04030201, 5], [15, 0]]
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_the_package_unpacks_our_words(bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    codes = np.random.default_rng(1).integers(0, 1 << bits, (5, 19)).astype(np.uint8)
    theirs = unpack_from_int32(
        torch.from_numpy(pack_words(codes, bits)), bits, torch.Size(codes.shape)
    )
    np.testing.assert_array_equal(theirs.numpy().astype(int) + (1 << bits - 1), codes)


# ---------------------------------------------------------------- refusals


def _refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        work()
    return str(caught.value)


@pytest.mark.parametrize(
    ("bits", "got"),
    [
        ((3, 8, False), "W3A8"),
        ((4, 4, False), "W4A4"),
        ((2, 16, False), "W2A16"),
        ((2, 8, True), "W2*A8"),
    ],
)
def test_schemes_that_it_cannot_say(bits: tuple[int, int, bool], got: str) -> None:
    assert (
        _refusal(lambda: check(QuantScheme("ABQGemm", "rtn", *bits)))
        == f"--format compressed-tensors: got {got}, {EXPECTED}"
    )


def test_a_layer_of_such_a_scheme(
    tiny_quant: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = _copy(tiny_quant(), tmp_path)
    _mix(quant, read_quant(tiny_quant(wbits=3) / "quant"), monkeypatch)
    assert (
        _refusal(lambda: formats.write(NAME, quant))
        == f"model.layers.0.mlp.down_proj: got W3A8, {EXPECTED}"
    )
    assert not [*(quant.path / NAME).iterdir()]


@pytest.mark.parametrize(
    ("fields", "value", "span", "largest"),
    [
        ({}, -1, "-1 to", 15),
        ({"abits": 16, "group_size": 32}, 16, "to 16", 15),
        ({"wbits": 8}, 256, "to 256", 255),
    ],
    ids=str,
)
def test_zero_points_outside_the_codes(
    tiny_quant: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    value: int,
    span: str,
    largest: int,
) -> None:
    quant = _copy(tiny_quant(**fields), tmp_path)
    own, wrong = quant.linear, "model.layers.1.mlp.up_proj"
    zero = np.array(own(wrong).arrays.zero)
    zero[3, -1] = value

    def linear(name: str) -> QuantLinear:
        return (
            replace(own(name), arrays=replace(own(name).arrays, zero=zero))
            if name == wrong
            else own(name)
        )

    monkeypatch.setattr(quant, "linear", linear)
    low, high = zero.min(), zero.max()
    assert span in f"{low} to {high}"
    assert _refusal(lambda: formats.write(NAME, quant)) == (
        f"{wrong}: got zero points from {low} to {high}, expected 0 to {largest} for --format "
        f"compressed-tensors. "
        "Use --group-size 0 or larger groups, or leave out --format."
    )
    assert not [*(quant.path / NAME).iterdir()]


def test_a_checkpoint_with_several_linears_in_a_tensor(tiny_llama: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_llama(architecture="Phi3", **FAMILIES["Phi3"])), True)
    assert _refusal(lambda: check(QuantScheme("ABQGemm", "rtn", 4, 8), checkpoint)) == (
        f"{checkpoint.name}: got a family whose checkpoints hold several linears in one tensor such "
        "as model.layers.0.self_attn.qkv_proj.weight, expected one tensor for each linear for "
        "--format compressed-tensors. Leave out --format."
    )


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_a_mixture_of_experts(tiny_llama: Callable[..., Path], name: str) -> None:
    checkpoint = open_checkpoint(str(tiny_llama(architecture=name, **FAMILIES[name])), True)
    assert _refusal(lambda: check(QuantScheme("ABQGemm", "rtn", 4, 8), checkpoint)) == (
        f"{checkpoint.name}: got a mixture of experts, whose folder transformers would not open, "
        "expected a model without experts for --format compressed-tensors. Leave out --format."
    )


def test_rotary_frequencies_of_a_gguf_file(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, scheme = (
        open_checkpoint(str(tiny_model_dir), True),
        QuantScheme("ABQGemm", "rtn", 4, 8),
    )
    frequencies, scaling = checkpoint.rope()
    check(scheme, checkpoint)
    monkeypatch.setattr(
        checkpoint,
        "rope",
        lambda name: (frequencies / np.linspace(1, 2, len(frequencies), dtype=np.float32), scaling),
    )
    message = (
        f"{checkpoint.name}: got rotary frequencies that do not follow from rope_type default, "
        f"expected those of config.json "
        "for --format compressed-tensors. Give the model as a Hugging Face folder, or leave out --format."
    )
    assert (
        _refusal(lambda: quantize_model(checkpoint, scheme, QuantizeOptions(format=NAME), tmp_path))
        == message
    )
    assert not [*tmp_path.iterdir()]
    quantize_model(checkpoint, scheme, QuantizeOptions(), tmp_path)  # our own format holds them
    assert _refusal(lambda: formats.write(NAME, read_quant(tmp_path))) == message


def test_end_tokens_and_sampling_come_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In the file from which transformers takes them, where config.json does not say it all."""
    from transformers import GenerationConfig

    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    scheme = QuantScheme("ABQGemm", "rtn", 8, 8)
    for number, fields in enumerate(({}, {"eos_token_id": [7], "top_p": 0.9})):
        (model / "generation_config.json").write_text(json.dumps(fields))
        out = tmp_path / str(number)
        out.mkdir()
        quantize_model(open_checkpoint(str(model), True), scheme, QuantizeOptions(), out)
        folder = _written(read_quant(out))
        assert (folder / "generation_config.json").exists() == bool(fields)
    config = GenerationConfig.from_pretrained(str(folder))
    assert (config.eos_token_id, config.bos_token_id) == ([0, 7], 0)
    assert (config.top_p, config.do_sample) == (0.9, False)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_frequencies_of_a_config(
    tiny_llama: Callable[..., Path], rope: dict[str, Any]
) -> None:
    check(
        QuantScheme("ABQGemm", "rtn", 4, 8),
        open_checkpoint(str(tiny_llama(rope_parameters=rope)), True),
    )


# ---------------------------------------------------------------- the registry and the command line


def test_registry(tiny_quant: Callable[..., Path], tmp_path: Path) -> None:
    assert formats.format_names() == ("anybit", "compressed-tensors")
    quant = _copy(tiny_quant(wbits=3), tmp_path)
    before = sorted(quant.path.iterdir())
    formats.check("anybit", quant.scheme)
    formats.write("anybit", quant)
    assert sorted(quant.path.iterdir()) == before
    message = (
        "format 'gptq': unknown, expected one of anybit, compressed-tensors. Check the spelling."
    )
    assert _refusal(lambda: formats.check("gptq", quant.scheme)) == message
    assert _refusal(lambda: formats.write("gptq", quant)) == message
    (quant.path / NAME).mkdir()
    assert _refusal(lambda: formats.write(NAME, quant)) == (
        f"{quant.path / NAME}: got a folder that is there already, expected none. Delete it to "
        f"write it again."
    )


def test_command(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from calibration.__main__ import main

    def run(wbits: str) -> int:
        return main(
            [
                str(tiny_model_dir),
                "--wbits",
                wbits,
                "--abits",
                "8",
                "--format",
                NAME,
                "--out",
                str(tmp_path / "out"),
                "--offline",
                "--progress",
                "none",
            ]
        )

    assert run("3") == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err == f"--format compressed-tensors: got W3A8, {EXPECTED}\n"
    assert run("4") == 0
    first = {path: path.read_bytes() for path in (tmp_path / "out" / "quant" / NAME).iterdir()}
    assert sorted(path.name for path in first) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(str(tmp_path).encode() in content for content in first.values())
    assert run("4") == 0 and {path: path.read_bytes() for path in first} == first
