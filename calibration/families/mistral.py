"""Mistral 7B from version 0.2 on: LLaMA's decoder under another name, as long as attention has no
sliding window.
"""

from __future__ import annotations

from typing import Any

from calibration.families.decoder import Family
from calibration.families.llama import block

__all__ = ["FAMILY"]


def _sliding_window(config: Any) -> str:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return ""
    return f"got sliding_window {window}, expected null (attention over the whole context)"


FAMILY = Family("mistral", "MistralForCausalLM", "mistral", block, objection=_sliding_window)
