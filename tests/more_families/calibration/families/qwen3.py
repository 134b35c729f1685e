"""Qwen3 (dense): LLaMA's decoder with a norm of every query and key head."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, HeadNorm, Norm, Rope, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer; some layers may have a window."""
    hidden, heads = config.hidden, config.heads
    bias = bool(config.get("attention_bias"))
    slides = config.values["layer_types"][index] == "sliding_attention"
    return (
        Norm("input_layernorm", hidden, config.epsilon),
        projections(config, bias),
        heads,
        HeadNorm(
            Norm("self_attn.q_norm", heads.head_dim, config.epsilon),
            Norm("self_attn.k_norm", heads.head_dim, config.epsilon),
        ),
        Rope(),
        Attend(heads.head_dim**-0.5, window=config.get("sliding_window") if slides else None),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        *gated_mlp(config),
        Add(),
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", "qwen3", block)
