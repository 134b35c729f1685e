"""Gemma 3 (text): Gemma 2's decoder with a norm of every query and key head in the place of
attention's softcap, and rotary frequencies of their own in the layers with a window.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.gemma2 import head
from calibration.families.parts import (
    gated_mlp,
    gemma_norm,
    head_norms,
    output_projection,
    projections,
    refuse_bidirectional,
    root_scaled_embedding,
)
from calibration.families.steps import Add, Attend, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    refuse_bidirectional(config)
    bias, window = bool(config.get("attention_bias")), config.window(index)
    return (
        gemma_norm("input_layernorm", config),
        projections(config, bias),
        config.heads,
        head_norms(config, offset=1.0),
        config.rope("full_attention" if window is None else "sliding_attention"),
        Attend(config.number("query_pre_attn_scalar") ** -0.5, window=window),
        output_projection(config, bias),
        gemma_norm("post_attention_layernorm", config),
        Add(),
        gemma_norm("pre_feedforward_layernorm", config),
        *gated_mlp(config, activation="hidden_activation"),
        gemma_norm("post_feedforward_layernorm", config),
        Add(),
    )


FAMILY = Family(
    "gemma3",
    "Gemma3ForCausalLM",
    "gemma3_text",
    block,
    embedding=root_scaled_embedding,
    head=head,
)
