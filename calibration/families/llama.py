"""LLaMA 1, 2, 3 and models of the same architecture (SmolLM2, TinyLlama, Vicuna ...)."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY", "block"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, heads = config.hidden, config.heads
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, bias, rotary=True),
        heads,
        config.rope(),
        Attend(scale=heads.head_dim**-0.5),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        *gated_mlp(config, mlp_bias),
        Add(),
    )


FAMILY = Family("llama", "LlamaForCausalLM", "llama", block, gguf="llama")
