"""Arcee's AFM: LLaMA's attention, and an MLP without a gate, relu^2 of the up projection."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import output_projection, projections
from calibration.families.steps import Activate, Add, Attend, Linear, Linears, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, width, heads = config.hidden, config.intermediate, config.heads
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return (
        Norm("input_layernorm", hidden, config.epsilon),
        projections(config, bias),
        heads,
        config.rope(),
        Attend(scale=heads.head_dim**-0.5),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        Linears("mlp.up_proj", (Linear("mlp.up_proj", width, hidden, mlp_bias),)),
        Activate(config.activation()),
        Linears("mlp.down_proj", (Linear("mlp.down_proj", hidden, width, mlp_bias),)),
        Add(),
    )


FAMILY = Family("arcee", "ArceeForCausalLM", "arcee", block)
