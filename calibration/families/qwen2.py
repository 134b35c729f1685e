"""Qwen2 and Qwen2.5 (dense): LLaMA's decoder with a bias on queries, keys and values alone, and
where the config asks for it a window from some layer on.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    hidden, heads = config.hidden, config.heads
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, bias=True),
        heads,
        config.rope(),
        Attend(heads.head_dim**-0.5, window=config.window(index)),
        output_projection(config),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        *gated_mlp(config),
        Add(),
    )


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "qwen2",
    block,
    gguf="qwen2",
    models="Qwen2 and Qwen2.5, dense",
    aliases={
        "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
        "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
        "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
        "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
        "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
        "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    },
)
