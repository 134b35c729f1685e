"""Opening a float model: what is read, and everything that is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.checkpoints.quantized import accepted_formats
from calibration.families import accepted_architectures
from plugins.errors import InputError
from tests.conftest import FAMILIES


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder), offline=True)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"dtype": "bfloat16"},
        {"shard_size": "100KB"},
        {"architecture": "Mistral", "sliding_window": None},
        {"head_dim": 32},
    ],
    ids=str,
)
def test_variants_open_and_give_their_tensors(
    tiny_llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = tiny_llama(**changes)
    checkpoint = open_checkpoint(str(folder), offline=True)
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    names = list(checkpoint.decoder.shapes())
    assert set(names) == set(stored)
    assert checkpoint.parameter_count == sum(tensor.numel() for tensor in stored.values())
    for name in names:
        assert torch.equal(checkpoint.tensor(name), stored[name].float())


def test_bin_weights_are_the_same_model(model: Path, tiny_model_dir: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    original, copy = open_checkpoint(str(tiny_model_dir), True), open_checkpoint(str(model), True)
    for name in original.decoder.shapes():
        assert torch.equal(original.tensor(name), copy.tensor(name))


def test_fingerprint_depends_on_weights_and_config_but_not_on_the_place(
    tiny_model_dir: Path, model: Path
) -> None:
    first = open_checkpoint(str(tiny_model_dir), True).fingerprint
    assert open_checkpoint(str(model), True).fingerprint == first
    _change_config(model, rms_norm_eps=1e-4)
    second = open_checkpoint(str(model), True).fingerprint
    _change_weights(model, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    assert len({first, second, open_checkpoint(str(model), True).fingerprint}) == 3


def test_a_fingerprint_and_a_stamp_are_those_of_the_content(
    tiny_model_dir: Path, model: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    """Whatever files are called and whenever they were written."""
    for path in model.iterdir():
        os.utime(path, (1, 1))
    first = open_checkpoint(str(tiny_model_dir), True).stamp()
    assert open_checkpoint(str(model), True).stamp() == first
    (model / "tokenizer_config.json").write_text("{}")
    assert open_checkpoint(str(model), True).stamp() != first
    (renamed := tmp_path / "other.gguf").write_bytes(tiny_gguf.read_bytes())
    assert (
        open_checkpoint(str(renamed), True).stamp() == open_checkpoint(str(tiny_gguf), True).stamp()
    )


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
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_types(tiny_llama: Callable[..., Path], rope: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(rope_parameters=rope)
    frequencies, scaling = open_checkpoint(str(folder), True).rope()
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    np.testing.assert_array_equal(frequencies, rotary.inv_freq.numpy())
    assert scaling == rotary.attention_scaling
    assert (scaling != 1.0) == (rope["rope_type"] in ("yarn", "longrope"))


def test_old_rope_scaling_key(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    (model / "config.json").write_text(
        json.dumps(
            {**config, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        )
    )
    frequencies, _ = open_checkpoint(str(model), True).rope()
    np.testing.assert_allclose(frequencies, 0.5 * 5000.0 ** (-np.arange(0, 16, 2) / 16), rtol=1e-6)


@pytest.mark.parametrize(
    ("rope", "problem"),
    [
        (
            {"rope_type": "proportional", "factor": 2.0},
            "got rope_type proportional, expected one of default, linear, dynamic, llama3, yarn, "
            "longrope",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "got partial_rotary_factor 0.5, expected 1 (the whole head rotates)",
        ),
    ],
)
def test_these_rope_settings_are_refused(model: Path, rope: dict[str, Any], problem: str) -> None:
    _change_config(model, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope})
    assert _refusal(model) == (
        f"{model / 'config.json'}: {problem}. Choose a model without it; this export would compute "
        "something else."
    )


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        (
            "Gemma2",
            {"query_pre_attn_scalar": -1},
            "got query_pre_attn_scalar -1, expected a number from 1e-18 to 1e18",
        ),
        (
            "Gemma2",
            {"attn_logit_softcapping": 1e308},
            "got attn_logit_softcapping 1e+308, expected a number from 1e-18 to 1e18",
        ),
        (
            "Gemma2",
            {"use_bidirectional_attention": True},
            "got use_bidirectional_attention true, expected causal attention",
        ),
        (
            "Qwen2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "got layer_types chunked_attention for layer 1, expected full_attention or "
            "sliding_attention",
        ),
        (
            "Qwen2",
            {"use_sliding_window": False},
            "got sliding_window None, expected a whole number above 0",
        ),
        (
            "SmolLM3",
            {"no_rope_layers": [1, 0]},
            "got no_rope_layers [1, 0], expected 0 or 1 for every layer",
        ),
        (
            "Granite",
            {"logits_scaling": 0.0},
            "got logits_scaling 0.0, expected a number from 1e-18 to 1e18",
        ),
    ],
)
def test_fields_that_no_step_can_follow_are_named(
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    problem: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(architecture=name, **FAMILIES[name]), folder)
    _change_config(folder, **changes)
    assert _refusal(folder) == (
        f"{folder / 'config.json'}: {problem}. Choose a model without it; this export would "
        "compute something else."
    )


def test_factors_of_another_head_are_refused(model: Path) -> None:
    factors = {"short_factor": [1.0] * 7, "long_factor": [2.0] * 7}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, **factors}
    _change_config(model, rope_parameters={"rope_theta": 10000.0, **rope})
    message = _refusal(model)
    assert message.startswith(f"{model}: got RoPE settings without frequencies (")
    assert message.endswith("Correct rope_theta and rope_scaling in config.json.")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"hidden_act": "gelu"},
            "got hidden_act gelu, expected one of silu, swish, gelu_pytorch_tanh, relu2",
        ),
        (
            {"num_key_value_heads": 3},
            "got 4 attention heads on 3 key-value heads, expected a multiple",
        ),
    ],
)
def test_configs_that_the_graph_cannot_express(
    model: Path, changes: dict[str, Any], problem: str
) -> None:
    _change_config(model, **changes)
    assert _refusal(model) == (
        f"{model / 'config.json'}: {problem}. Choose a model without it; this export would compute "
        "something else."
    )


def test_already_quantised_checkpoint(model: Path) -> None:
    _change_config(model, quantization_config={"quant_method": "aqlm", "nbits": 4})
    assert _refusal(model) == (
        f"{model / 'config.json'}, quantization_config: got an already quantized checkpoint "
        f"(quant_method aqlm), expected float32, float16 or bfloat16 weights, or those of "
        f"{accepted_formats()}. Give the float model it was made from."
    )
    _change_config(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert _refusal(model) == (
        f"{model}: got a config of gptq and tensors such as model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight and 17 more, expected "
        "layers with codes. The config and the weights do not belong together: take the quantization "
        "config away, or give the weights that it is for."
    )


def test_unknown_architecture(model: Path) -> None:
    _change_config(model, architectures=["Qwen9ForCausalLM"])
    assert _refusal(model) == (
        f"{model / 'config.json'}: got architecture Qwen9ForCausalLM, expected one of "
        f"{', '.join(accepted_architectures())}. "
        "Choose a model of a supported architecture, or add a file to calibration/families."
    )


def test_folder_without_config_and_corrupt_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text('{"hidden_size": 6')
    assert _refusal(model) == (
        f"{path}: got unreadable JSON (Input data was truncated), expected "
        "a whole file. "
        "The file is truncated or damaged: download it again."
    )
    path.unlink()
    assert _refusal(model) == (
        f"{model}: got a folder without config.json, expected a Hugging Face model folder. "
        "Give the folder that holds config.json and the weights."
    )


def test_missing_tensors_are_summarised(model: Path) -> None:
    _change_config(model, num_hidden_layers=4)
    assert _refusal(model) == (
        f"{model}: got 20 of the 38 tensors its config asks for, missing "
        f"model.layers.2.input_layernorm.weight, "
        "model.layers.2.post_attention_layernorm.weight, model.layers.2.self_attn.q_proj.weight "
        "and 15 more "
        "(layers in the file: 2, in the config: 4). The file is incomplete or belongs to a "
        "smaller model: check the download."
    )


def test_missing_head_of_an_untied_model(model: Path) -> None:
    _change_config(model, tie_word_embeddings=False)
    assert _refusal(model) == (
        f"{model}: got 20 of the 21 tensors its config asks for, missing lm_head.weight. "
        "If the head is the embedding, set tie_word_embeddings to true in the config; else complete "
        "the weights."
    )


def test_tensors_of_a_model_saved_without_its_head(model: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _change_weights(model, strip)
    assert _refusal(model) == (
        f"{model}: got 0 of the 20 tensors its config asks for, missing model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, model.layers.0.post_attention_layernorm.weight "
        "and 17 more (names lack the "
        "prefix "
        "model.). Save the model with its head (LlamaForCausalLM, not LlamaModel)."
    )


def test_wrong_shape(model: Path) -> None:
    _change_config(model, num_key_value_heads=4)
    assert _refusal(model) == (
        f"{model}, tensor model.layers.0.self_attn.k_proj.weight: got shape [32, 64], expected "
        f"[64, 64] from the config. "
        "The weights and the config belong to different models: use the config of these weights."
    )


def test_bias_that_the_config_does_not_ask_for(model: Path) -> None:
    _change_weights(
        model,
        lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}),
    )
    assert _refusal(model) == (
        f"{model}: got tensors the config does not ask for: model.layers.1.self_attn.q_proj.bias. "
        "The export would drop them: correct num_hidden_layers, attention_bias or mlp_bias in the config, "
        "or save the model without them."
    )


def test_truncated_safetensors(model: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    assert _refusal(model) == (
        f"{path}: got {size - 1000} bytes, expected {size} from its header. "
        "The file is truncated or damaged: download or make it again."
    )


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_not_finite_weights_name_the_tensor(model: Path, value: float, text: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    _change_weights(model, lambda tensors: tensors[name].__setitem__((3, 5), value))
    checkpoint = open_checkpoint(str(model), True)
    with pytest.raises(InputError) as caught:
        checkpoint.array(name)
    assert str(caught.value) == (
        f"{model}, tensor {name}: got {text} at [3, 5], expected finite numbers. "
        "The weights are damaged: download or train them again."
    )


def test_integer_weights_are_refused(model: Path) -> None:
    name = "model.norm.weight"
    _change_weights(model, lambda tensors: tensors.update({name: torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(model), True).array(name)
    assert str(caught.value) == (
        f"{model}, tensor {name}: got dtype int8, expected one of float64, float32, float16, "
        "bfloat16. "
        "Give the float model."
    )


def test_folder_without_tokenizer(model: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(model), True).tokenizer()
    assert caught.value.where == str(model)
    assert caught.value.problem.startswith("got no readable tokenizer (")
    assert (
        caught.value.fix
        == "Put the model's tokenizer.json and tokenizer_config.json beside its weights"
    )
