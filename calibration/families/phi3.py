"""Phi-3, Phi-3.5 and Phi-4 (mini and 14B): LLaMA's decoder with queries, keys and values in one
tensor of the checkpoint and gate and up in another, heads that turn in part, and longrope.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, heads = config.hidden, config.heads
    gate_up, gate, down = gated_mlp(config)
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        replace(projections(config), fused=True, gguf="attn_qkv"),
        heads,
        config.rope(partial=True),
        Attend(heads.head_dim**-0.5, window=config.sliding_window),
        output_projection(config),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        replace(gate_up, fused=True, gguf="ffn_up"),
        gate,
        down,
        Add(),
    )


def gguf_rope(config: Config) -> dict[str, Any]:
    """A GGUF file counts the channels that turn, a config has their share of a head."""
    rope, head_dim = config.get("rope_parameters"), config.heads.head_dim
    share = config.size("rotary_dim", head_dim) / head_dim
    return {"rope_parameters": {**rope, "partial_rotary_factor": share}}


FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    "phi3",
    block,
    gguf="phi3",
    gguf_fields={
        "attention.sliding_window": "sliding_window",
        "rope.dimension_count": "rotary_dim",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    gguf_implied=gguf_rope,
    models="Phi-3 and 3.5 (mini, medium), Phi-4 and Phi-4-mini",
    aliases={
        "phi-3-mini-4k": "microsoft/Phi-3-mini-4k-instruct",
        "phi-3-mini-128k": "microsoft/Phi-3-mini-128k-instruct",
        "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
        "phi-4": "microsoft/phi-4",
        "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    },
    own_code=(
        "configuration_phi3.Phi3Config",
        "modeling_phi3.Phi3ForCausalLM",
        "Xenova/gpt-4o",  # where Phi-4-mini's tokenizer.json is from
    ),
)
