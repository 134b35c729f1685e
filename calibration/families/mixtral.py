"""Mixtral: Mistral's decoder with experts in the place of the MLP."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import output_projection, projections, routed_mlp
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    hidden, heads = config.hidden, config.heads
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, rotary=True),
        heads,
        config.rope(),
        Attend(heads.head_dim**-0.5, window=config.sliding_window),
        output_projection(config),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        routed_mlp(
            config, "block_sparse_moe", ("w1", "w3", "w2"), config.intermediate, normalized=True
        ),
        Add(),
    )


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    "mixtral",
    block,
    gguf="llama",
    gguf_fields={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    gguf_required=("expert_count", "expert_used_count"),
    models="Mixtral",
    aliases={
        "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    },
)
