"""SmolLM3: LLaMA's decoder in which every fourth layer turns nothing."""

from __future__ import annotations

from calibration.families.decoder import Config, Family, UnsupportedError
from calibration.families.parts import gated_mlp, output_projection, projections
from calibration.families.steps import Add, Attend, Norm, Step

__all__ = ["FAMILY"]


def turns(config: Config, index: int) -> bool:
    """Whether a layer has rotary positions: 1 in no_rope_layers, in spite of the name.

    Raises:
        UnsupportedError: the list does not say so.
    """
    kinds = config.get("no_rope_layers")
    if not isinstance(kinds, list) or len(kinds) < config.layers or kinds[index] not in (0, 1):
        raise UnsupportedError(f"got no_rope_layers {kinds}, expected 0 or 1 for every layer")
    return bool(kinds[index])


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    hidden, heads = config.hidden, config.heads
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    rope = config.rope()
    return (
        Norm("input_layernorm", hidden, config.epsilon, "attn_norm"),
        projections(config, bias, rotary=True),
        heads,
        *((rope,) if turns(config, index) else ()),
        Attend(heads.head_dim**-0.5, window=config.window(index)),
        output_projection(config, bias),
        Add(),
        Norm("post_attention_layernorm", hidden, config.epsilon, "ffn_norm"),
        *gated_mlp(config, mlp_bias),
        Add(),
    )


FAMILY = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "smollm3",
    block,
    gguf="smollm3",
    models="SmolLM3",
    aliases={
        "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    },
)
