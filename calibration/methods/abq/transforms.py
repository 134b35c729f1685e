"""What ABQ-LLM learns about a block's float weights: equivalent rescalings of its channels, and a
rank-1 compensation of down_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from calibration.blocks.forward import BlockWeights
from calibration.families.decoder import Block, Site
from calibration.families.steps import HeadNorm, Norm

__all__ = ["Compensation", "EquivalentTransform", "TransformParts"]

_FLOOR = 1e-2  # least |s|; keeps 1 / s from running away
_LEAST = 1e-5  # of the ranges that the start divides and takes roots of


@dataclass(frozen=True)
class TransformParts:
    """Which scales of a block are learned.

    Attributes:
        sites: whose inputs are scaled: a norm's gain, value rows or up rows take 1 / s in. None is
            every site in front of which there is something that can.
        query_key: k_proj rows -> q_proj rows. It moves no rounding of weights (their codes are per
            row) and matters only where queries or keys are quantised. A norm of heads would undo
            it, so where there is one it is left out.
    """

    sites: tuple[str, ...] | None = None
    query_key: bool = True


class EquivalentTransform(nn.Module):  # type: ignore[misc]
    """Learnable equivalent transforms (LET): scales s that cancel in the float block and change
    what its quantised form rounds.

    They start as a power of SmoothQuant's s = A^alpha / W^(1 - alpha) (arXiv 2211.10438), with A
    the largest input of a channel and W the largest weight of its column over all linears that read
    it. Their geometric mean is 1: a common factor changes nothing that is rounded, and learning
    rates then mean the same in every block. query_key starts at 1.

    Behind attention there is one scale per key-value channel, [kv_heads * d].

    Args:
        weights: of the float block.
        block: its steps.
        absmax: per site the largest |input| of each channel, [K]; of the sites that are learned.
        parts: the scales to learn.
        alpha: 0.5 in the paper.
    """

    def __init__(
        self,
        weights: BlockWeights,
        block: Block,
        absmax: Mapping[str, Tensor],
        parts: TransformParts,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        self._block, heads = block, block.heads
        self.sites = tuple(
            node
            for node, site in block.sites.items()
            if site.source is not None and (parts.sites is None or node in parts.sites)
        )

        def start(node: str) -> nn.Parameter:
            site = block.sites[node]
            groups = heads.groups if site.by_value_head else 1
            stacked = [weights[f"{name}.weight"] for name in site.linears.names]
            columns = torch.cat(stacked).abs().amax(0)
            ranges = [
                self._shared(x, groups).amax(1).flatten().clamp(min=_LEAST)
                for x in (absmax[node], columns)
            ]
            s = ranges[0] ** alpha / ranges[1] ** (1 - alpha)
            return nn.Parameter(s / s.log().mean().exp())

        self._scales = nn.ParameterList(map(start, self.sites))
        self.query_key = None
        norms = any(isinstance(step, HeadNorm) for step in block.steps)
        apart = len(_before_attention(block).linears.members) == 3
        if parts.query_key and apart and not norms:
            like = weights[block.norms[0].gain]
            self.query_key = nn.Parameter(like.new_ones(heads.kv_heads, heads.head_dim // 2))
        self._start = [scale.detach().clone() for scale in self._scales]
        self.project()

    def scale(self, node: str) -> nn.Parameter:
        """The scales of a learned site."""
        parameter: nn.Parameter = self._scales[self.sites.index(node)]
        return parameter

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def restart(self, site: str, power: float) -> None:
        """Put the scales of a site's input at a power of their start; 0 is none, 1 the paper's."""
        self.scale(site).copy_(self._start[self.sites.index(site)] ** power)
        self.project()

    def _shared(self, channels: Tensor, groups: int) -> Tensor:
        """[heads * d] of query heads -> [kv_heads, groups, d]; of one group [1, 1, K]."""
        if groups == 1:
            return channels.view(1, 1, -1)
        return channels.view(-1, groups, self._block.heads.head_dim)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def project(self) -> None:
        """Keep every |s| at 0.01 or more, with its sign; after each step of the optimiser."""
        for s in self.parameters():
            s.copy_(torch.copysign(s.abs().clamp(min=_FLOOR), s))

    def columns(self) -> dict[str, Tensor]:
        """The scales [K] of each learned site's weight columns; its input is divided by them."""
        return {
            node: self._per_query_head(s) if self._block.sites[node].by_value_head else s
            for node, s in zip(self.sites, self._scales, strict=True)
        }

    def apply_to(self, weights: BlockWeights) -> BlockWeights:
        """The same function in other weights: scales folded into gains, rows, columns and biases;
        differentiable.
        """
        scaled = dict(weights)
        for node, s in self.columns().items():
            for name in self._block.sites[node].linears.names:
                scaled[f"{name}.weight"] = scaled[f"{name}.weight"] * s
        for node, s in zip(self.sites, self._scales, strict=True):
            source = self._block.sites[node].source
            assert source is not None
            if isinstance(source, Norm):
                scaled[source.gain] = scaled[source.gain] / s
            else:
                _scale_rows(scaled, source.name, 1 / s)
        if self.query_key is not None:
            query, key, _ = _before_attention(self._block).linears.names
            # equal on i and i + d/2, which RoPE mixes
            pairs = torch.cat((self.query_key, self.query_key), -1).flatten()
            _scale_rows(scaled, key, pairs)
            _scale_rows(scaled, query, 1 / self._per_query_head(pairs))
        return scaled

    def _per_query_head(self, channels: Tensor) -> Tensor:
        """[kv_heads * d] -> [heads * d], each key-value head's scales for all of its query heads."""
        heads = self._block.heads
        rows = channels.view(-1, heads.head_dim)
        return rows.repeat_interleave(heads.groups, 0).flatten()


def _before_attention(block: Block) -> Site:
    """The site of queries, keys and values."""
    sites = tuple(block.sites.values())
    return next(first for first, second in pairwise(sites) if second.attention)


def _scale_rows(weights: BlockWeights, name: str, s: Tensor) -> None:
    weights[f"{name}.weight"] = weights[f"{name}.weight"] * s[:, None]
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"] * s


class Compensation(nn.Module):  # type: ignore[misc]
    """A rank-1 matrix added to a block's last linear (down_proj) before it is quantised; it costs
    nothing at run time and starts at 0.

    Args:
        weights: of the float block.
        block: its steps.
    """

    def __init__(self, weights: BlockWeights, block: Block) -> None:
        super().__init__()
        last = block.branches[-1].sites[-1].linears
        self._name = f"{last.names[-1]}.weight"
        weight = weights[self._name]
        self.left = nn.Parameter(torch.zeros_like(weight[:, :1]))
        self.right = nn.Parameter(torch.ones_like(weight[:1]))

    def apply_to(self, weights: BlockWeights) -> BlockWeights:
        """The weights with left right^T in that linear."""
        return {**weights, self._name: weights[self._name] + self.left @ self.right}
