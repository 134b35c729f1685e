"""What an engine takes, by its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.graph.names import WRITE_INDICES
from plugins.errors import InputError

if TYPE_CHECKING:
    from exporter.engine.record import EngineRecord

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


def engine_limits(record: EngineRecord) -> EngineLimits:
    """The limits of its profiles "prefill" and "decode", and of its position tables, which may end
    before.

    Raises:
        InputError: the profiles are not those of a decoder.
    """
    prefill, decode = (profile["inputs"] for profile in record["profiles"])
    for name, rank in (("input_ids", 2), ("logits_indices", 2), ("past_key_values.0.key", 4)):
        if any(
            name not in inputs or len(inputs[name]["max"]) != rank for inputs in (prefill, decode)
        ):
            raise InputError(
                "engine.json, profiles",
                f"got no {name} of {rank} sizes, expected the profiles of a decoder",
                "It is damaged: build the engine again",
            )
    batch, tokens = prefill["input_ids"]["max"]
    cached = [inputs["past_key_values.0.key"]["max"][2] for inputs in (prefill, decode)]
    # A static cache holds the new tokens too.
    static = WRITE_INDICES in prefill
    longest = cached[0] if static else max(cached[0] + tokens, cached[1] + 1)
    # Engines of version 0.1 have no tables that end before their profiles do.
    return EngineLimits(
        max_batch=batch,
        max_tokens=tokens,
        max_context=min(record.get("max_context", longest), longest),
    )
