"""Granite 3 (dense): LLaMA's decoder with multipliers of the embedding, the scores, what is
added to the residual stream, and the logits.
"""

from __future__ import annotations

from dataclasses import replace

from calibration.families.decoder import Config, Embedding, Family, Head
from calibration.families.llama import block as llama_block
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """LLaMA's steps with other numbers."""

    def changed(step: Step) -> Step:
        if isinstance(step, Attend):
            return replace(step, scale=config.number("attention_multiplier"))
        return Add(config.number("residual_multiplier")) if step == Add() else step

    return tuple(map(changed, llama_block(config, index)))


def embedding(config: Config) -> Embedding:
    """Rows times a number."""
    return Embedding(scale=config.number("embedding_multiplier"))


def head(config: Config) -> Head:
    """Logits divided by a number, as which the gain of the norm in front of them is taken."""
    factor = 1 / config.number("logits_scaling")
    norm = Norm("model.norm", config.hidden, config.epsilon, "output_norm", factor=factor)
    return Head(norm, tied=bool(config.get("tie_word_embeddings")))


FAMILY = Family(
    "granite",
    "GraniteForCausalLM",
    "granite",
    block,
    gguf="granite",
    gguf_fields={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "logit_scale": "logits_scaling",
        "residual_scale": "residual_multiplier",
    },
    gguf_implied=lambda config: {"attention_multiplier": config.heads.head_dim**-0.5},
    embedding=embedding,
    head=head,
    models="Granite 3, dense",
    aliases={
        "granite-3.3-2b": "ibm-granite/granite-3.3-2b-instruct",
        "granite-3.3-8b": "ibm-granite/granite-3.3-8b-instruct",
    },
)
