"""Gemma 2: gains stored as gain - 1, norms on both sides of attention and MLP, a scaled embedding,
softcaps, and a window in every other layer.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Family, Head
from calibration.families.parts import (
    gated_mlp,
    gemma_norm,
    gguf_query_scalar,
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
    bias = bool(config.get("attention_bias"))
    return (
        gemma_norm("input_layernorm", config, "attn_norm"),
        projections(config, bias),
        config.heads,
        config.rope(),
        Attend(
            config.number("query_pre_attn_scalar") ** -0.5,
            window=config.window(index),
            softcap=config.cap("attn_logit_softcapping"),
        ),
        output_projection(config, bias),
        gemma_norm("post_attention_layernorm", config, "post_attention_norm"),
        Add(),
        gemma_norm("pre_feedforward_layernorm", config, "ffn_norm"),
        *gated_mlp(config, activation="hidden_activation"),
        gemma_norm("post_feedforward_layernorm", config, "post_ffw_norm"),
        Add(),
    )


def head(config: Config) -> Head:
    """With a softcap."""
    norm, tied = (
        gemma_norm("model.norm", config, "output_norm"),
        bool(config.get("tie_word_embeddings")),
    )
    return Head(norm, tied=tied, softcap=config.cap("final_logit_softcapping"))


FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "gemma2",
    block,
    gguf="gemma2",
    gguf_fields={
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    gguf_implied=lambda config: {"query_pre_attn_scalar": gguf_query_scalar(config, 46)},
    embedding=root_scaled_embedding,
    head=head,
    models="Gemma 2",
    aliases={
        "gemma-2-2b": "google/gemma-2-2b-it",
        "gemma-2-9b": "google/gemma-2-9b-it",
        "gemma-2-27b": "google/gemma-2-27b-it",
    },
)
