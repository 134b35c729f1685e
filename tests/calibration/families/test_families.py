"""The declared families against the state dicts of transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from calibration.families import (
    accepted_architectures,
    family,
    family_names,
    family_of_architecture,
)
from plugins.errors import InputError

NAMES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def test_the_file_name_is_the_key() -> None:
    assert family_names() == [*NAMES]
    assert all(family(name).name == name for name in family_names())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}),
        *((name, {}) for name in NAMES if name != "llama"),
    ],
)
def test_declared_tensors_are_those_of_transformers(
    name: str, changes: dict[str, Any], tied: bool
) -> None:
    found = family(name)
    config = transformers.AutoConfig.for_model(
        found.model_type, **SIZES, **changes, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        model = getattr(transformers, found.architecture)(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert found.decoder(config.to_dict()).module_shapes() == expected


def test_every_linear_is_in_one_group() -> None:
    block = family("llama").decoder(SIZES | {"rms_norm_eps": 1e-5}).blocks[0]
    assert list(block.sites) == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]
    names = [linear.name for linear in block.linears]
    assert len(names) == len(set(names)) == 7
    for site in block.sites.values():
        assert len({linear.in_features for linear in site.linears.members}) == 1


def test_unknown_family_and_architecture() -> None:
    with pytest.raises(InputError) as caught:
        family("gpt2")
    assert str(caught.value) == (
        f"model family 'gpt2': unknown, expected one of {', '.join(NAMES)}. "
        "Make the quantised folder again with this version."
    )
    with pytest.raises(InputError) as caught:
        family_of_architecture("GPT2LMHeadModel", "m/config.json")
    assert str(caught.value) == (
        "m/config.json: got architecture GPT2LMHeadModel, expected one of "
        f"{', '.join(NAMES.values())}. "
        "Choose a model of a supported architecture, or add a file to calibration/families."
    )
    assert accepted_architectures() == sorted(NAMES.values())
