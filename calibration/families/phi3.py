"""Phi-3, Phi-3.5 and Phi-4 (mini and 14B): LLaMA's decoder with queries, keys and values in one
tensor of the checkpoint and gate and up in another, heads that turn in part, and longrope.
"""

from __future__ import annotations

from dataclasses import replace

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, heads = config.hidden, config.heads
    gate_up, gate, down = gated_mlp(config)
    return (
        Norm("input_layernorm", hidden, config.epsilon),
        replace(projections(config), fused=True),
        heads,
        config.rope(partial=True),
        Attend(heads.head_dim**-0.5, window=config.sliding_window),
        output_projection(config),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        replace(gate_up, fused=True),
        gate,
        down,
        Add(),
    )


FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    "phi3",
    block,
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
