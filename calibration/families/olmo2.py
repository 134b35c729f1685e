"""OLMo 2: norms behind attention and MLP and none in front, and a norm of all query and key heads
together.
"""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.parts import gated_mlp, head_norms, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Rope, Step

__all__ = ["FAMILY", "post_normed"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of every layer."""
    return post_normed(config, config.rope(), None)


def post_normed(config: Config, rope: Rope, window: int | None) -> tuple[Step, ...]:
    """The steps of a layer that turns and looks back so."""
    hidden, heads = config.hidden, config.heads
    bias = bool(config.get("attention_bias"))
    return (
        projections(config, bias),
        heads,
        head_norms(config, whole=True),
        rope,
        Attend(heads.head_dim**-0.5, window=window),
        output_projection(config, bias),
        Norm("post_attention_layernorm", hidden, config.epsilon, "post_attention_norm"),
        Add(),
        *gated_mlp(config),
        Norm("post_feedforward_layernorm", hidden, config.epsilon, "post_ffw_norm"),
        Add(),
    )


FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "olmo2",
    block,
    gguf="olmo2",
    models="OLMo 2",
    aliases={
        "olmo-2-1b": "allenai/OLMo-2-0425-1B-Instruct",
        "olmo-2-7b": "allenai/OLMo-2-1124-7B-Instruct",
        "olmo-2-13b": "allenai/OLMo-2-1124-13B-Instruct",
        "olmo-2-32b": "allenai/OLMo-2-0325-32B-Instruct",
    },
)
