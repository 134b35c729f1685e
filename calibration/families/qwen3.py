"""Qwen3 (dense): LLaMA's decoder with a norm of every query and key head."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, head_norms, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer; some layers may have a window."""
    hidden, heads = config.hidden, config.heads
    bias = bool(config.get("attention_bias"))
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, bias),
        heads,
        head_norms(config),
        config.rope(),
        Attend(heads.head_dim**-0.5, window=config.window(index)),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        *gated_mlp(config),
        Add(),
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", "qwen3", block)
