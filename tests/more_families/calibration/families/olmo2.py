"""OLMo 2: norms behind attention and MLP and none in front, and a norm of all query and key heads
together.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, HeadNorm, Norm, Rope, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    hidden, heads = config.hidden, config.heads
    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    bias = bool(config.get("attention_bias"))
    return (
        projections(config, bias),
        heads,
        HeadNorm(
            Norm("self_attn.q_norm", q, config.epsilon),
            Norm("self_attn.k_norm", kv, config.epsilon),
        ),
        Rope(),
        Attend(heads.head_dim**-0.5),
        output_projection(config, bias),
        Norm("post_attention_layernorm", hidden, config.epsilon),
        Add(),
        *gated_mlp(config),
        Norm("post_feedforward_layernorm", hidden, config.epsilon),
        Add(),
    )


FAMILY = Family("olmo2", "Olmo2ForCausalLM", "olmo2", block)
