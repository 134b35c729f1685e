"""Names of the graph's tensors that others ask for; docs/onnx.md documents them."""

from __future__ import annotations

__all__ = ["KINDS", "layer_output", "new_key", "past", "present"]

KINDS = ("key", "value")  # of a layer's cache


def layer_output(index: int) -> str:
    """Name of the residual stream after decoder layer `index`, [B, S, hidden]."""
    return f"model.layers.{index}.output"


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
