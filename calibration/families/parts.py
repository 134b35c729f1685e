"""What most families have in common: the projections around attention, and the gated MLP."""

from __future__ import annotations

from calibration.families.decoder import Config
from calibration.families.steps import Gate, Linear, Linears

__all__ = ["gated_mlp", "output_projection", "projections"]


def projections(config: Config, bias: bool = False, rotary: bool = False) -> Linears:
    """Queries, keys and values of the residual stream.

    Args:
        bias: whether each has one.
        rotary: GGUF files hold the rows of queries and keys interleaved.
    """
    hidden, heads = config.hidden, config.heads
    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    return Linears(
        "self_attn.qkv_proj",
        (
            Linear("self_attn.q_proj", q, hidden, bias, "attn_q", rotary),
            Linear("self_attn.k_proj", kv, hidden, bias, "attn_k", rotary),
            Linear("self_attn.v_proj", kv, hidden, bias, "attn_v"),
        ),
    )


def output_projection(config: Config, bias: bool = False) -> Linears:
    """Attention's heads, side by side, back to the width of the residual stream."""
    width = config.heads.heads * config.heads.head_dim
    linear = Linear("self_attn.o_proj", config.hidden, width, bias, "attn_output")
    return Linears(linear.name, (linear,))


def gated_mlp(config: Config, bias: bool = False) -> tuple[Linears, Gate, Linears]:
    """The gate and up projections, their product, and the down projection."""
    hidden, width = config.hidden, config.intermediate
    down = Linear("mlp.down_proj", hidden, width, bias, "ffn_down")
    return (
        Linears(
            "mlp.gate_up_proj",
            (
                Linear("mlp.gate_proj", width, hidden, bias, "ffn_gate"),
                Linear("mlp.up_proj", width, hidden, bias, "ffn_up"),
            ),
        ),
        Gate(config.activation),
        Linears(down.name, (down,)),
    )
