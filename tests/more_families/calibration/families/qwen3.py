"""Qwen3 (dense): LLaMA's decoder with a norm of every query and key head."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.steps import (
    Add,
    Attend,
    Gate,
    HeadNorm,
    Linear,
    Linears,
    Norm,
    Rope,
    Step,
)

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer; some layers may have a window."""
    hidden, width, heads = config.hidden, config.intermediate, config.heads
    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    bias = bool(config.get("attention_bias"))
    slides = config.values["layer_types"][index] == "sliding_attention"
    return (
        Norm("input_layernorm", hidden, config.epsilon),
        Linears(
            "self_attn.qkv_proj",
            (
                Linear("self_attn.q_proj", q, hidden, bias),
                Linear("self_attn.k_proj", kv, hidden, bias),
                Linear("self_attn.v_proj", kv, hidden, bias),
            ),
        ),
        heads,
        HeadNorm(
            Norm("self_attn.q_norm", heads.head_dim, config.epsilon),
            Norm("self_attn.k_norm", heads.head_dim, config.epsilon),
        ),
        Rope(),
        Attend(heads.head_dim**-0.5, window=config.get("sliding_window") if slides else None),
        Linears("self_attn.o_proj", (Linear("self_attn.o_proj", hidden, q, bias),)),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        Linears(
            "mlp.gate_up_proj",
            (
                Linear("mlp.gate_proj", width, hidden),
                Linear("mlp.up_proj", width, hidden),
            ),
        ),
        Gate(config.activation),
        Linears("mlp.down_proj", (Linear("mlp.down_proj", hidden, width),)),
        Add(),
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", "qwen3", block)
