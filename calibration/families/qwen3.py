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


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "qwen3",
    block,
    gguf="qwen3",
    models="Qwen3, dense",
    aliases={
        "qwen3-0.6b": "Qwen/Qwen3-0.6B",
        "qwen3-1.7b": "Qwen/Qwen3-1.7B",
        "qwen3-4b": "Qwen/Qwen3-4B",
        "qwen3-8b": "Qwen/Qwen3-8B",
        "qwen3-14b": "Qwen/Qwen3-14B",
        "qwen3-32b": "Qwen/Qwen3-32B",
    },
)
