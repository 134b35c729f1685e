"""Mistral 7B from version 0.2 on: LLaMA's decoder under another name, as long as attention has no
sliding window.
"""

from __future__ import annotations

from typing import Any

from calibration.families.base import ModelFamily
from calibration.families.llama import GROUPS, LAYER_NORMS

__all__ = ["FAMILY"]


def _sliding_window(config: Any) -> str:
    window = getattr(config, "sliding_window", None)
    return (
        f"got sliding_window {window}, expected null (attention over the whole context)"
        if window is not None
        else ""
    )


FAMILY = ModelFamily(
    "mistral", "MistralForCausalLM", "mistral", "", GROUPS, LAYER_NORMS, _sliding_window
)
