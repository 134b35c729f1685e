"""Gemma 2: gains stored as gain - 1, norms on both sides of attention and MLP, a scaled embedding,
softcaps, and a window in every other layer.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Family, Head
from calibration.families.parts import (
    gated_mlp,
    gemma_norm,
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
        gemma_norm("input_layernorm", config),
        projections(config, bias),
        config.heads,
        config.rope(),
        Attend(
            config.number("query_pre_attn_scalar") ** -0.5,
            window=config.window(index),
            softcap=config.cap("attn_logit_softcapping"),
        ),
        output_projection(config, bias),
        gemma_norm("post_attention_layernorm", config),
        Add(),
        gemma_norm("pre_feedforward_layernorm", config),
        *gated_mlp(config, activation="hidden_activation"),
        gemma_norm("post_feedforward_layernorm", config),
        Add(),
    )


def head(config: Config) -> Head:
    """With a softcap."""
    norm, tied = gemma_norm("model.norm", config), bool(config.get("tie_word_embeddings"))
    return Head(norm, tied=tied, softcap=config.cap("final_logit_softcapping"))


FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "gemma2",
    block,
    embedding=root_scaled_embedding,
    head=head,
)
