"""What ABQ-LLM learns about a block's float weights: equivalent rescalings of its channels, and a
rank-1 compensation of down_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.blocks.forward import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    OUT,
    POST_NORM,
    QKV,
    SITES,
    BlockShape,
    BlockWeights,
)

__all__ = ["Compensation", "EquivalentTransform", "TransformParts"]

_FLOOR = 1e-2  # least |s|; keeps 1 / s from running away
_LEAST = 1e-5  # of the ranges that the start divides and takes roots of
_QUERY, _KEY, _VALUE = SITES[QKV]
_UP = SITES[GATE_UP][1]
_PARTS = {QKV: "qkv", OUT: "out", GATE_UP: "gate_up", DOWN: "down"}


@dataclass(frozen=True)
class TransformParts:
    """Which scales of a block are learned.

    Attributes:
        qkv, gate_up: norm gain -> the linears behind it.
        out: v_proj rows -> o_proj columns, one scale per key-value channel.
        down: up_proj rows -> down_proj columns.
        query_key: k_proj rows -> q_proj rows. It moves no rounding of weights (their codes are per
            row) and matters only where queries or keys are quantised.
    """

    qkv: bool = True
    out: bool = True
    gate_up: bool = True
    down: bool = True
    query_key: bool = True


class EquivalentTransform(nn.Module):  # type: ignore[misc]
    """Learnable equivalent transforms (LET): scales s that cancel in the float block and change
    what its quantised form rounds.

    They start as a power of SmoothQuant's s = A^alpha / W^(1 - alpha) (arXiv 2211.10438), with A
    the largest input of a channel and W the largest weight of its column over all linears that read
    it. Their geometric mean is 1: a common factor changes nothing that is rounded, and learning
    rates then mean the same in every block. query_key starts at 1.

    Args:
        weights: of the float block.
        shape: its heads.
        absmax: per site the largest |input| of each channel, [K]; of the sites that are learned.
        parts: the scales to learn.
        alpha: 0.5 in the paper.
    """

    def __init__(
        self,
        weights: BlockWeights,
        shape: BlockShape,
        absmax: Mapping[str, Tensor],
        parts: TransformParts,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        self._shape = shape

        def start(site: str, groups: int = 1) -> nn.Parameter:
            columns = torch.cat([weights[f"{name}.weight"] for name in SITES[site]]).abs().amax(0)
            ranges = [
                self._shared(x, groups).amax(1).flatten().clamp(min=_LEAST)
                for x in (absmax[site], columns)
            ]
            s = ranges[0] ** alpha / ranges[1] ** (1 - alpha)
            return nn.Parameter(s / s.log().mean().exp())

        gain = weights[f"{INPUT_NORM}.weight"]
        self.qkv = start(QKV) if parts.qkv else None
        self.out = start(OUT, shape.groups) if parts.out else None
        self.gate_up = start(GATE_UP) if parts.gate_up else None
        self.down = start(DOWN) if parts.down else None
        self.query_key = (
            nn.Parameter(gain.new_ones(shape.kv_heads, shape.head_dim // 2))
            if parts.query_key
            else None
        )
        self._start = {
            site: getattr(self, name).detach().clone()
            for site, name in _PARTS.items()
            if getattr(self, name) is not None
        }
        self.project()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose inputs are scaled."""
        return tuple(self._start)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def restart(self, site: str, power: float) -> None:
        """Put the scales of a site's input at a power of their start; 0 is none, 1 the paper's."""
        getattr(self, _PARTS[site]).copy_(self._start[site] ** power)
        self.project()

    def _shared(self, channels: Tensor, groups: int) -> Tensor:
        """[heads * d] of query heads -> [kv_heads, groups, d]; of one group [1, 1, K]."""
        return (
            channels.view(1, 1, -1)
            if groups == 1
            else channels.view(-1, groups, self._shape.head_dim)
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def project(self) -> None:
        """Keep every |s| at 0.01 or more, with its sign; after each step of the optimiser."""
        for s in self.parameters():
            s.copy_(torch.copysign(s.abs().clamp(min=_FLOOR), s))

    def columns(self) -> dict[str, Tensor]:
        """The scales [K] of each learned site's weight columns; its input is divided by them."""
        out = None if self.out is None else self._per_query_head(self.out)
        scales = {QKV: self.qkv, OUT: out, GATE_UP: self.gate_up, DOWN: self.down}
        return {site: s for site, s in scales.items() if s is not None}

    def apply_to(self, weights: BlockWeights) -> BlockWeights:
        """The same function in other weights: scales folded into gains, rows, columns and biases;
        differentiable.
        """
        scaled = dict(weights)
        for site, s in self.columns().items():
            for name in SITES[site]:
                scaled[f"{name}.weight"] = scaled[f"{name}.weight"] * s
        for norm, s in ((INPUT_NORM, self.qkv), (POST_NORM, self.gate_up)):
            if s is not None:
                scaled[f"{norm}.weight"] = scaled[f"{norm}.weight"] / s
        for name, s in ((_VALUE, self.out), (_UP, self.down)):
            if s is not None:
                _scale_rows(scaled, name, 1 / s)
        if self.query_key is not None:
            pairs = torch.cat(
                (self.query_key, self.query_key), -1
            ).flatten()  # equal on i and i + d/2, which RoPE mixes
            _scale_rows(scaled, _KEY, pairs)
            _scale_rows(scaled, _QUERY, 1 / self._per_query_head(pairs))
        return scaled

    def _per_query_head(self, channels: Tensor) -> Tensor:
        """[kv_heads * d] -> [heads * d], each key-value head's scales for all of its query heads."""
        return (
            channels.view(-1, self._shape.head_dim)
            .repeat_interleave(self._shape.groups, 0)
            .flatten()
        )


def _scale_rows(weights: BlockWeights, name: str, s: Tensor) -> None:
    weights[f"{name}.weight"] = weights[f"{name}.weight"] * s[:, None]
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"] * s


class Compensation(nn.Module):  # type: ignore[misc]
    """A rank-1 matrix added to down_proj before it is quantised; it costs nothing at run time and
    starts at 0.

    Args:
        weights: of the float block.
    """

    def __init__(self, weights: BlockWeights) -> None:
        super().__init__()
        self._name = f"{SITES[DOWN][0]}.weight"
        weight = weights[self._name]
        self.left = nn.Parameter(torch.zeros_like(weight[:, :1]))
        self.right = nn.Parameter(torch.ones_like(weight[:1]))

    def apply_to(self, weights: BlockWeights) -> BlockWeights:
        """The weights with left right^T in down_proj."""
        return {**weights, self._name: weights[self._name] + self.left @ self.right}
