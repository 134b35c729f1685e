"""Names of the graph's tensors that others ask for; docs/onnx.md documents them."""

from __future__ import annotations

import re

__all__ = [
    "KINDS",
    "WRITE_INDICES",
    "is_cache",
    "is_layer_output",
    "is_routed",
    "layer_of",
    "layer_output",
    "new_key",
    "past",
    "present",
]

KINDS = ("key", "value")  # of a layer's cache
WRITE_INDICES = "write_indices"  # tokens that each row of a static cache has already, int64 [B]


def layer_output(index: int) -> str:
    """Name of the residual stream after decoder layer `index`, [B, S, hidden]."""
    return f"model.layers.{index}.output"


def is_layer_output(tensor: str) -> bool:
    """Whether a tensor's name is one that layer_output gives."""
    return re.fullmatch(r"model\.layers\.[0-9]+\.output", tensor) is not None


def is_cache(tensor: str) -> bool:
    """Whether a tensor's name is one that past or present gives."""
    return tensor.startswith(("past_key_values.", "present."))


def is_routed(tensor: str) -> bool:
    """Whether a tensor holds the rows of one expert, [1, rows, width], by its name."""
    return re.search(r"\.experts\.[0-9]+\.", tensor) is not None


def layer_of(tensor: str) -> int | None:
    """The decoder layer that a tensor's name tells of, whatever the tensor; None of the head's."""
    return next((int(part) for part in tensor.split(".") if part.isdecimal()), None)


def new_key(index: int) -> str:
    """Name of decoder layer `index`'s new keys after RoPE, [B, kv_heads, S, head_dim]; a low-bit
    cache quantises them next.
    """
    return f"model.layers.{index}.self_attn.key"


def past(index: int, kind: str) -> str:
    """Name of decoder layer `index`'s cached keys or values, [B, kv_heads, P, head_dim]."""
    return f"past_key_values.{index}.{kind}"


def present(index: int, kind: str) -> str:
    """The same with the new ones behind them, [B, kv_heads, T, head_dim]."""
    return f"present.{index}.{kind}"
