"""OLMo 2: norms behind attention and MLP and none in front, and a norm of all query and key heads
together.
"""

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
    """The steps of every layer."""
    hidden, width, heads = config.hidden, config.intermediate, config.heads
    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    bias = bool(config.get("attention_bias"))
    return (
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
            Norm("self_attn.q_norm", q, config.epsilon),
            Norm("self_attn.k_norm", kv, config.epsilon),
        ),
        Rope(),
        Attend(heads.head_dim**-0.5),
        Linears("self_attn.o_proj", (Linear("self_attn.o_proj", hidden, q, bias),)),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        Add(),
        Linears(
            "mlp.gate_up_proj",
            (
                Linear("mlp.gate_proj", width, hidden),
                Linear("mlp.up_proj", width, hidden),
            ),
        ),
        Gate(config.activation),
        Linears("mlp.down_proj", (Linear("mlp.down_proj", hidden, width),)),
        Norm("post_feedforward_layernorm", hidden, config.epsilon),
        Add(),
    )


FAMILY = Family("olmo2", "Olmo2ForCausalLM", "olmo2", block)
