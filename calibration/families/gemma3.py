"""Gemma 3 (text): Gemma 2's decoder with a norm of every query and key head in the place of
attention's softcap, and rotary frequencies of their own in the layers with a window.
"""

from __future__ import annotations

from typing import Any

from calibration.families.decoder import Config, Family
from calibration.families.gemma2 import head
from calibration.families.parts import (
    gated_mlp,
    gemma_norm,
    gguf_query_scalar,
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
        gemma_norm("input_layernorm", config, "attn_norm"),
        projections(config, bias),
        config.heads,
        head_norms(config, offset=1.0),
        config.rope("full_attention" if window is None else "sliding_attention"),
        Attend(config.number("query_pre_attn_scalar") ** -0.5, window=window),
        output_projection(config, bias),
        gemma_norm("post_attention_layernorm", config, "post_attention_norm"),
        Add(),
        gemma_norm("pre_feedforward_layernorm", config, "ffn_norm"),
        *gated_mlp(config, activation="hidden_activation"),
        gemma_norm("post_feedforward_layernorm", config, "post_ffw_norm"),
        Add(),
    )


def implied(config: Config) -> dict[str, Any]:
    """What a GGUF file's rotary frequencies and sizes stand for."""
    return {
        "query_pre_attn_scalar": gguf_query_scalar(config, 62),
        "rope_parameters": {"full_attention": config.get("rope_parameters")},
    }


FAMILY = Family(
    "gemma3",
    "Gemma3ForCausalLM",
    "gemma3_text",
    block,
    gguf="gemma3",
    gguf_fields={
        "attention.sliding_window": "sliding_window",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    gguf_implied=implied,
    embedding=root_scaled_embedding,
    head=head,
    models="Gemma 3, text alone",
    aliases={
        "gemma-3-270m": "google/gemma-3-270m-it",
        "gemma-3-1b": "google/gemma-3-1b-it",
    },
)
