"""OLMo 3: OLMo 2's decoder with a window in three layers of four, and longer waves in the fourth."""

from __future__ import annotations

from calibration.families.decoder import Config, Family
from calibration.families.olmo2 import post_normed
from calibration.families.steps import Step

__all__ = ["FAMILY"]


def block(config: Config, index: int) -> tuple[Step, ...]:
    """The steps of a layer."""
    window = config.window(index)
    rope = config.rope("full_attention" if window is None else "sliding_attention")
    return post_normed(config, rope, window)


FAMILY = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    "olmo3",
    block,
    models="OLMo 3 and 3.1",
    aliases={
        "olmo-3-7b": "allenai/Olmo-3-7B-Instruct",
        "olmo-3.1-32b": "allenai/Olmo-3.1-32B-Instruct",
    },
)
