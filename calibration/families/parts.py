"""What several families have in common: the projections around attention, norms of heads, the gated
MLP, and what all of Gemma's decoders do.
"""

from __future__ import annotations

from dataclasses import replace

from calibration.families.decoder import Config, Embedding, UnsupportedError
from calibration.families.steps import Experts, Gate, HeadNorm, Linear, Linears, Norm, Packed

__all__ = [
    "gated_mlp",
    "gemma_norm",
    "gguf_query_scalar",
    "head_norms",
    "output_projection",
    "projections",
    "refuse_bidirectional",
    "root_scaled_embedding",
    "routed_mlp",
]


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


def head_norms(config: Config, whole: bool = False, offset: float = 0.0) -> HeadNorm:
    """Norms of queries and keys.

    Args:
        whole: over all heads of a token together, else of each.
        offset: as Norm's.
    """
    heads = config.heads
    query, key = (
        Norm(
            f"self_attn.{name}_norm",
            heads.head_dim * (count if whole else 1),
            config.epsilon,
            f"attn_{name}_norm",
            offset=offset,
        )
        for name, count in (("q", heads.heads), ("k", heads.kv_heads))
    )
    return HeadNorm(query, key)


def gated_mlp(
    config: Config, bias: bool = False, activation: str = "hidden_act"
) -> tuple[Linears, Gate, Linears]:
    """The gate and up projections, their product, and the down projection.

    Args:
        bias: whether each has one.
        activation: the field that names it.
    """
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
        Gate(config.activation(activation)),
        Linears(down.name, (down,)),
    )


def routed_mlp(
    config: Config, prefix: str, names: tuple[str, str, str], width: int, normalized: bool
) -> Experts:
    """Experts that are gated MLPs without biases.

    Args:
        prefix: of the router and the experts in their makers' files, such as "mlp".
        names: there, of an expert's gate, up and down projection; transformers stacks the experts'.
        width: of each MLP.
        normalized: as Experts'.
    """
    hidden, gate = config.hidden, Gate(config.activation())

    def expert(index: int) -> tuple[Linears, Gate, Linears]:
        own = f"{prefix}.experts.{index}"
        inner = Packed("mlp.experts.gate_up_proj", index)
        down = Linear(
            f"{own}.{names[2]}",
            hidden,
            width,
            gguf="ffn_down_exps",
            packed=Packed("mlp.experts.down_proj", index),
        )
        return (
            Linears(
                f"{own}.gate_up_proj",
                (
                    Linear(f"{own}.{names[0]}", width, hidden, gguf="ffn_gate_exps", packed=inner),
                    Linear(
                        f"{own}.{names[1]}",
                        width,
                        hidden,
                        gguf="ffn_up_exps",
                        packed=replace(inner, start=width),
                    ),
                ),
            ),
            gate,
            Linears(down.name, (down,)),
        )

    router = Linear(
        f"{prefix}.gate",
        config.experts,
        hidden,
        gguf="ffn_gate_inp",
        packed=Packed("mlp.gate.weight"),
    )
    members = tuple(expert(index) for index in range(config.experts))
    return Experts(router, members, config.experts_per_token, normalized)


def gemma_norm(name: str, config: Config, gguf: str) -> Norm:
    """A norm of the residual stream's width whose gain is stored as gain - 1."""
    return Norm(name, config.hidden, config.epsilon, gguf, offset=1.0)


def root_scaled_embedding(config: Config) -> Embedding:
    """Rows times the root of their width."""
    return Embedding(scale=config.hidden**0.5)


def gguf_query_scalar(config: Config, layers: int) -> int:
    """What the queries of a GGUF file are divided by the root of: the width of a head, but in the
    largest model, which llama.cpp knows by its `layers`.
    """
    heads = config.heads
    return config.hidden // heads.heads if config.layers == layers else heads.head_dim


def refuse_bidirectional(config: Config) -> None:
    """Raise UnsupportedError for an encoder's attention."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError("got use_bidirectional_attention true, expected causal attention")
