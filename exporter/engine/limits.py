"""What an engine's optimization profiles allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.errors import InputError

__all__ = ["EngineLimits", "engine_limits"]


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """The most that an engine takes.

    Attributes:
        max_batch: sequences in one call.
        max_tokens: new tokens in one call.
        max_context: tokens of a sequence.
    """

    max_batch: int
    max_tokens: int
    max_context: int


def engine_limits(profiles: Sequence[Mapping[str, Any]]) -> EngineLimits:
    """The limits of the profiles "prefill" and "decode", as engine.json holds them.

    Raises:
        InputError: they are not those of a decoder.
    """
    prefill, decode = (profile["inputs"] for profile in profiles)
    for name, rank in (("input_ids", 2), ("past_key_values.0.key", 4)):
        if any(len(inputs.get(name, {"max": ()})["max"]) != rank for inputs in (prefill, decode)):
            raise InputError(
                "engine.json, profiles",
                f"got no {name} of {rank} sizes, expected the profiles of a decoder",
                "It is damaged: build the engine again",
            )
    batch, tokens = prefill["input_ids"]["max"]
    cached = [inputs["past_key_values.0.key"]["max"][2] for inputs in (prefill, decode)]
    return EngineLimits(
        max_batch=batch, max_tokens=tokens, max_context=max(cached[0] + tokens, cached[1] + 1)
    )
