"""LLaMA 1, 2, 3 and models of the same architecture (SmolLM2, TinyLlama, Vicuna ...)."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.steps import (
    Add,
    Attend,
    Gate,
    Linear,
    Linears,
    Norm,
    Rope,
    Step,
)

__all__ = ["FAMILY", "block"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, width, heads = config.hidden, config.intermediate, config.heads
    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        Linears(
            "self_attn.qkv_proj",
            (
                Linear("self_attn.q_proj", q, hidden, bias, "attn_q", rotary=True),
                Linear("self_attn.k_proj", kv, hidden, bias, "attn_k", rotary=True),
                Linear("self_attn.v_proj", kv, hidden, bias, "attn_v"),
            ),
        ),
        heads,
        Rope(),
        Attend(scale=heads.head_dim**-0.5),
        Linears("self_attn.o_proj", (Linear("self_attn.o_proj", hidden, q, bias, "attn_output"),)),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        Linears(
            "mlp.gate_up_proj",
            (
                Linear("mlp.gate_proj", width, hidden, mlp_bias, "ffn_gate"),
                Linear("mlp.up_proj", width, hidden, mlp_bias, "ffn_up"),
            ),
        ),
        Gate(config.activation),
        Linears("mlp.down_proj", (Linear("mlp.down_proj", hidden, width, mlp_bias, "ffn_down"),)),
        Add(),
    )


FAMILY = Family("llama", "LlamaForCausalLM", "llama", block, gguf="llama")
