"""One decoder block as a function of its weights, in fp32 torch: what calibration runs,
differentiable, equal to transformers' decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.reference.steps import Context, HeadHook, Rope, run

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.families import Decoder
    from calibration.families.decoder import Block

__all__ = [
    "BlockWeights",
    "Linear",
    "block_output",
    "embedded",
    "float_linear",
    "load_block",
    "norm_gains",
]

# "self_attn.q_proj.weight" [N, K], "self_attn.q_proj.bias" [N] if any, "input_layernorm.weight" [H]
BlockWeights = dict[str, Tensor]
Linear = Callable[[str, Tensor], Tensor]  # (site, x [..., K]) -> [..., N], members along N


def load_block(checkpoint: Checkpoint, index: int) -> BlockWeights:
    """Float weights of decoder block `index`, fp32, by their names below the layer's prefix."""
    block = checkpoint.decoder.blocks[index]
    names = [info.name for info in block.tensors()]
    return {name.removeprefix(f"{block.prefix}."): checkpoint.tensor(name) for name in names}


def embedded(table: Tensor, tokens: Tensor, decoder: Decoder) -> Tensor:
    """The residual stream before the first block: rows of the table, scaled where the family says
    so.
    """
    rows, scale = table[tokens], decoder.embedding.scale
    return rows if scale is None else rows * scale


def norm_gains(weights: Mapping[str, Tensor], block: Block) -> BlockWeights:
    """The gains of a block's norms among its weights, and what else stays in floating point."""
    return {name: weights[name] for name in block.floats}


def float_linear(weights: Mapping[str, Tensor], block: Block) -> Linear:
    """The float block's linears."""

    def linear(site: str, x: Tensor) -> Tensor:
        names = block.sites[site].linears.names
        parts = (F.linear(x, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in names)
        return torch.cat(list(parts), -1)

    return linear


def block_output(
    x: Tensor,
    gains: Mapping[str, Tensor],
    linear: Linear,
    block: Block,
    rope: Rope,
    heads: HeadHook | None = None,
) -> Tensor:
    """The residual stream after the block, [B, L, H] -> [B, L, H].

    Args:
        x: residual stream before it.
        gains: of the norms, and weights of routers, by their names below the prefix.
        linear: how each site multiplies, float or quantised.
        block: its steps.
        rope: positions 0..L-1.
        heads: what becomes of rotated queries, keys and values; cached_heads for a low-bit cache.
    """
    context = Context(gains, rope, linear)
    if heads is not None:
        context = Context(gains, rope, linear, heads)
    return run(block.steps, x, context).x
