"""LLaMA's block written out by hand, which the declared one is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.families import Decoder, family
from calibration.families.decoder import Block
from calibration.reference.fake_quant import quantize_cache
from calibration.reference.steps import Rope

__all__ = [
    "DOWN",
    "EPSILON",
    "GATE_UP",
    "INPUT_NORM",
    "LINEARS",
    "OUT",
    "POST_NORM",
    "QKV",
    "SITES",
    "attend",
    "cached_heads",
    "heads_from_qkv",
    "llama",
    "llama_block",
    "mlp_product",
    "rms_norm",
]

QKV, OUT = "self_attn.qkv_proj", "self_attn.o_proj"
GATE_UP, DOWN = "mlp.gate_up_proj", "mlp.down_proj"
SITES = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    OUT: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}
LINEARS = tuple(name for names in SITES.values() for name in names)
INPUT_NORM, POST_NORM = "input_layernorm", "post_attention_layernorm"
EPSILON = 1e-5


def llama(layers: int, **changes: Any) -> Decoder:
    """The family's decoder with the sizes of the tests' tiny model."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": True,
    }
    return family("llama").decoder(config | changes)


def llama_block(
    heads: int, kv_heads: int, head_dim: int, hidden: int, intermediate: int, bias: bool = False
) -> Block:
    """The family's block with these sizes."""
    decoder = llama(
        1,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return decoder.blocks[0]


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * gain


def heads_from_qkv(qkv: Tensor, block: Block, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, (heads + 2 kv_heads) d] -> rotated queries [B, heads, L, d], rotated keys and values
    [B, kv_heads, L, d].
    """
    heads = block.heads
    stacked = qkv.unflatten(-1, (-1, heads.head_dim)).transpose(-3, -2)
    query, key, value = stacked.split([heads.heads, heads.kv_heads, heads.kv_heads], -3)
    return rope.rotate(query), rope.rotate(key), value


def cached_heads(bits: int) -> Callable[[Tensor, Block, Rope], tuple[Tensor, Tensor, Tensor]]:
    """heads_from_qkv, but with keys and values as a cache of these bits gives them back."""

    def heads(qkv: Tensor, block: Block, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = heads_from_qkv(qkv, block, rope)
        return query, quantize_cache(key, bits), quantize_cache(value, bits)

    return heads


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, [B, heads, L, d] -> [B, L, heads * d]."""
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return context.transpose(-3, -2).flatten(-2)


def mlp_product(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the stacked pair [..., 2 I] -> [..., I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
