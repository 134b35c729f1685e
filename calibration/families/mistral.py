"""Mistral 7B: LLaMA's decoder without biases, with a window in every layer in version 0.1."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, heads = config.hidden, config.heads
    return (
        Norm("input_layernorm", hidden, config.epsilon),
        projections(config),
        heads,
        config.rope(),
        Attend(heads.head_dim**-0.5, window=config.sliding_window),
        output_projection(config),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        *gated_mlp(config),
        Add(),
    )


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    "mistral",
    block,
    models="Mistral 7B, Nemo and Small (text)",
    aliases={
        "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
        "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
        "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
        "mistral-nemo-12b": "mistralai/Mistral-Nemo-Instruct-2407",
    },
)
