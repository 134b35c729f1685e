"""Granite 3 (dense): LLaMA's decoder with multipliers of the embedding, the scores and what is added
to the residual stream.
"""

from __future__ import annotations

from dataclasses import replace

from calibration.families.decoder import Config, Embedding, Family, UnsupportedError
from calibration.families.llama import block as llama_block
from calibration.families.steps import Add, Attend, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """LLaMA's steps with other numbers."""
    if config.get("logits_scaling", 1) != 1:
        raise UnsupportedError(f"got logits_scaling {config.get('logits_scaling')}, expected 1")

    def changed(step: Step) -> Step:
        if isinstance(step, Attend):
            return replace(step, scale=float(config.values["attention_multiplier"]))
        return Add(float(config.values["residual_multiplier"])) if step == Add() else step

    return tuple(map(changed, llama_block(config, index)))


def embedding(config: Config) -> Embedding:
    """Rows times a number."""
    return Embedding(scale=float(config.values["embedding_multiplier"]))


FAMILY = Family("granite", "GraniteForCausalLM", "granite", block, embedding=embedding)
