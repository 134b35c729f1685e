"""One decoder block as a function of its weights, in fp32 torch: what calibration runs,
differentiable, equal to transformers' LLaMA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.reference.fake_quant import FakeQuantize, fake_quantize, quantize_cache

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint

__all__ = [
    "DOWN",
    "GATE_UP",
    "INPUT_NORM",
    "OUT",
    "POST_NORM",
    "QKV",
    "SITES",
    "BlockShape",
    "BlockWeights",
    "Heads",
    "Linear",
    "Rope",
    "attend",
    "attention_rows",
    "block_output",
    "cached_heads",
    "float_linear",
    "heads_from_qkv",
    "load_block",
    "mlp_product",
    "rms_norm",
]

QKV, OUT, GATE_UP, DOWN = (
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
SITES = {  # a site is one GEMM node: the linears that read the same tensor, in stacking order
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    OUT: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}
INPUT_NORM, POST_NORM = "input_layernorm", "post_attention_layernorm"

BlockWeights = dict[
    str, Tensor
    # "self_attn.q_proj.weight" [N, K], "self_attn.q_proj.bias" [N] if any, "input_layernorm.weight" [H]
]
Linear = Callable[
    [str, Tensor], Tensor
]  # (site, x [..., K]) -> [..., N], the site's members stacked along N


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a decoder block that its weights do not tell."""

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float

    @classmethod
    def from_config(cls, config: Any) -> BlockShape:
        """Of a Hugging Face config."""
        heads = int(config.num_attention_heads)
        return cls(
            heads,
            int(config.num_key_value_heads),
            int(config.head_dim or config.hidden_size // heads),
            float(config.rms_norm_eps),
        )

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Rope:
    """cos and sin [L, head_dim] fp32 for positions 0..L-1."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, length: int, device: str | torch.device = "cpu") -> Rope:
        """Tables for windows of `length` tokens."""
        frequencies, scaling = checkpoint.rope()
        angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.from_numpy(
            frequencies.copy()
        )
        angles = torch.cat((angles, angles), -1).double()
        return cls(
            (angles.cos() * scaling).float().to(device), (angles.sin() * scaling).float().to(device)
        )

    def rotate(self, x: Tensor) -> Tensor:
        """[..., L, head_dim] -> the same, pairs (i, i + head_dim / 2) turned by their position's
        angle.
        """
        low, high = x.chunk(2, -1)
        return x * self.cos + torch.cat((-high, low), -1) * self.sin


def load_block(checkpoint: Checkpoint, index: int) -> BlockWeights:
    """Float weights of decoder block `index`, fp32, by their names below the layer's prefix."""
    family, prefix = checkpoint.family, checkpoint.family.layer(index)
    names = [f"{norm}.weight" for norm in family.layer_norms]
    for linear in family.linears():
        names.append(f"{linear.name}.weight")
        if family.has_bias(linear, checkpoint.dims):
            names.append(f"{linear.name}.bias")
    return {name: checkpoint.tensor(f"{prefix}.{name}") for name in names}


def float_linear(weights: Mapping[str, Tensor]) -> Linear:
    """The float block's linears."""

    def linear(site: str, x: Tensor) -> Tensor:
        return torch.cat(
            [
                F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
                for name in SITES[site]
            ],
            -1,
        )

    return linear


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


def heads_from_qkv(qkv: Tensor, shape: BlockShape, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, (heads + 2 kv_heads) d] -> rotated queries [B, heads, L, d], rotated keys and values
    [B, kv_heads, L, d].
    """
    qkv = qkv.unflatten(-1, (-1, shape.head_dim)).transpose(-3, -2)
    query, key, value = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], -3)
    return rope.rotate(query), rope.rotate(key), value


Heads = Callable[
    [Tensor, BlockShape, Rope], tuple[Tensor, Tensor, Tensor]
]  # heads_from_qkv, or one that does more


def cached_heads(bits: int, quantize: FakeQuantize = fake_quantize) -> Heads:
    """heads_from_qkv, but with keys and values as a cache of these bits gives them back; 16 leaves
    them.
    """

    def heads(qkv: Tensor, shape: BlockShape, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = heads_from_qkv(qkv, shape, rope)
        return query, quantize_cache(key, bits, quantize), quantize_cache(value, bits, quantize)

    return heads


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, [B, heads, L, d] -> [B, L, heads * d]."""
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    return (
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
        .transpose(-3, -2)
        .flatten(-2)
    )


def attention_rows(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """log of the causal attention probabilities of some query positions: [B, heads, len(rows), L],
    -inf after each position.
    """
    groups = query.shape[-3] // key.shape[-3]
    key = key.repeat_interleave(groups, -3) if groups > 1 else key
    scores = query[..., rows, :] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    later = torch.arange(key.shape[-2], device=rows.device) > rows[:, None]
    return scores.masked_fill(later, -torch.inf).log_softmax(-1)


def mlp_product(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the stacked pair [..., 2 I] -> [..., I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def block_output(
    x: Tensor,
    gains: Mapping[str, Tensor],
    linear: Linear,
    shape: BlockShape,
    rope: Rope,
    heads: Heads = heads_from_qkv,
) -> Tensor:
    """The residual stream after the block, [B, L, H] -> [B, L, H].

    Args:
        x: residual stream before it.
        gains: "input_layernorm.weight" and "post_attention_layernorm.weight".
        linear: how each site multiplies, float or quantised.
        heads: how the stacked projections become rotated queries and keys, and values; cached_heads
            for a low-bit cache.
    """
    qkv = linear(QKV, rms_norm(x, gains[f"{INPUT_NORM}.weight"], shape.epsilon))
    x = x + linear(OUT, attend(*heads(qkv, shape, rope)))
    product = mlp_product(linear(GATE_UP, rms_norm(x, gains[f"{POST_NORM}.weight"], shape.epsilon)))
    return x + linear(DOWN, product)
