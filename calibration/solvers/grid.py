"""Quantisation grids of weights: scales and zero points searched for the least weighted error, and
rounding onto them.

A grid is what the op can say and nothing else, so whatever is rounded on it reaches the kernel
untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plugins.core.op_spec import QuantArrays

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["AbqGrid", "Grid", "QqqGrid", "search_grid"]

TINY = 2.0**-126  # smallest scale: its reciprocal is finite and no GPU flushes it
_FLAT = (
    2.0**-15
)  # a group with a narrower range than this part of its absmax keeps a zero point of 16 bits
_QQQ_LOW, _QQQ_HIGH, _INT8_MAX = -8, 7, 127
_CHUNK = 1 << 22  # weights searched together


@dataclass(frozen=True)
class AbqGrid:
    """w = scale * (code - zero), code in 0..levels-1.

    Attributes:
        scale, zero: fp32 [N, G]; zero holds integers and may lie outside the codes.
        levels: number of codes.
    """

    scale: Tensor
    zero: Tensor
    levels: int

    def round(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of weights.

        Args:
            weight: [N] with the number of their group, or [N, K] with the group of each column [K].
        """
        scale, zero = self.scale[:, group], self.zero[:, group]
        codes = (torch.round(weight / scale) + zero).clamp(0, self.levels - 1)
        return codes, (codes - zero) * scale

    def values(self, codes: Tensor, group: Tensor) -> Tensor:
        """Weights [N, K] that codes [N, K] stand for, as the op defines them."""
        return (codes - self.zero[:, group]) * self.scale[:, group]

    def refitted(self, weight: Tensor, codes: Tensor, hessian: Tensor) -> AbqGrid:
        """The same zero points with the scales that suit these codes best, least squares under H
        over all groups of a row at once.
        """
        scale = _least_squares(
            (codes.unflatten(1, (self.scale.shape[1], -1)) - self.zero[..., None]), weight, hessian
        )
        return replace(self, scale=torch.where(_near(scale, self.scale), scale, self.scale))

    def arrays(self, codes: Tensor, bias: Tensor | None) -> QuantArrays:
        """What the quant folder stores."""
        return QuantArrays(
            codes.to(torch.uint8).cpu().numpy(),
            self.scale.float().cpu().numpy(),
            self.zero.to(torch.int32).cpu().numpy(),
            None,
            None if bias is None else bias.float().cpu().numpy(),
        )


@dataclass(frozen=True)
class QqqGrid:
    """w = channel * code, or channel * round(code * group): int8 weights from codes -8..7, the
    second rounding being part of the grid.

    A negative scale puts the odd level -8 on the positive side. Because GPTQ rounds on this very
    grid, it makes up for the re-rounding to int8 as for any other rounding (the published code does
    not: it re-rounds when GPTQ is over).

    Attributes:
        channel: fp32 [N, 1].
        group: fp16 values as fp32 [N, G] in int8 units, or None per channel.
    """

    channel: Tensor
    group: Tensor | None

    def round(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """As AbqGrid.round."""
        channel = self.channel[:, 0] if weight.ndim == 1 else self.channel
        if self.group is None:
            codes = torch.round(weight / channel).clamp(_QQQ_LOW, _QQQ_HIGH)
            return codes, codes * channel
        step = self.group[:, group]
        integer = weight / channel
        codes = torch.round(integer / step).clamp(_QQQ_LOW, _QQQ_HIGH)
        return codes, _int8(codes, step) * channel

    def values(self, codes: Tensor, group: Tensor) -> Tensor:
        """As AbqGrid.values."""
        return (
            codes * self.channel
            if self.group is None
            else _int8(codes, self.group[:, group]) * self.channel
        )

    def refitted(self, weight: Tensor, codes: Tensor, hessian: Tensor) -> QqqGrid:
        """The channel scales that suit these codes best; group scales, which make int8 weights,
        stay.
        """
        group = torch.arange(codes.shape[1], device=codes.device) // (
            codes.shape[1] // (1 if self.group is None else self.group.shape[1])
        )
        integers = self.values(codes, group) / self.channel
        channel = _least_squares(integers[:, None], weight, hessian)
        return replace(
            self, channel=torch.where(_near(channel, self.channel), channel, self.channel)
        )

    def arrays(self, codes: Tensor, bias: Tensor | None) -> QuantArrays:
        """What the quant folder stores."""
        group = None if self.group is None else self.group.half().cpu().numpy()
        return QuantArrays(
            codes.to(torch.int8).cpu().numpy(),
            self.channel.float().cpu().numpy(),
            None,
            group,
            None if bias is None else bias.float().cpu().numpy(),
        )


Grid = AbqGrid | QqqGrid


def _int8(codes: Tensor, step: Tensor) -> Tensor:
    return torch.round(codes * step).clamp(-_INT8_MAX, _INT8_MAX)


def _least_squares(integers: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """s [N, G] of least (w - sum_g s_g u_g) H (w - sum_g s_g u_g)^T for every row, u_g [N, G, size]
    being integers of group g.
    """
    groups, size = integers.shape[1:]
    wide = hessian.double().unflatten(0, (groups, size))  # [G, size, K]
    rows, found = max(1, _CHUNK // (groups * groups * size)), []
    for part, target in zip(
        integers.double().split(rows), weight.double().split(rows), strict=True
    ):
        product = part.transpose(0, 1) @ wide  # u_g H, [G, n, K]
        normal = (product.unflatten(2, (groups, size)) * part).sum(-1).transpose(0, 1)  # [n, G, G]
        right = (product * target).sum(-1).T  # [n, G]
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.amax(1, keepdim=True).clamp(min=TINY)
        found.append(torch.linalg.solve(normal, right))
    return torch.cat(found).float()


def _near(new: Tensor, old: Tensor) -> Tensor:
    """Scales that a refit may take: of the same sign and size, so that codes keep their meaning."""
    ratio = new / old
    return torch.isfinite(ratio) & (ratio > 0.5) & (ratio < 2) & (new.abs() >= TINY)


def search_grid(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor | None = None,
    steps: int = 40,
    shrink: float = 0.5,
) -> Grid:
    """The grid of least error sum_k importance[k] (w - w^)^2 per group, over clipped ranges (1 .. 1
    - shrink) of the min/max range.

    Args:
        weight: fp32 [N, K].
        scheme: op, levels and group size.
        importance: of each input channel [K], such as the Hessian's diagonal; None treats all
            alike.
        steps: clip ratios tried; 1 is min/max without a search.
    """
    size = scheme.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))  # [N, G, size]
    weights = (
        torch.ones(weight.shape[1], device=weight.device)
        if importance is None
        else importance.float()
    )
    weights = (weights / weights.mean().clamp(min=TINY)).unflatten(0, (-1, size))
    ratios = torch.linspace(1, 1 - shrink, steps).tolist() if steps > 1 else [1.0]
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [
        (_search_qqq if scheme.op == "QQQGemm" else _search_abq)(part, weights, scheme, ratios)
        for part in groups.split(rows)
    ]
    scale = torch.cat([part[0] for part in parts])
    if scheme.op != "QQQGemm":
        return AbqGrid(scale, torch.cat([part[1] for part in parts]), scheme.levels)
    if not scheme.group_size:
        return QqqGrid(scale, None)
    # int8 weights: |code * group| <= 127 for the farthest code of each group's sign, so that
    # nothing is clipped.
    channel = (scale.abs() * -_QQQ_LOW).amax(1, keepdim=True).clamp(min=TINY) / _INT8_MAX
    group = (scale / channel).half().float()
    return QqqGrid(
        channel, torch.where(group == 0, 1.0, group)
    )  # a group far below the row's others: its codes are 0 with any scale


def _search_abq(
    groups: Tensor, weights: Tensor, scheme: QuantScheme, ratios: list[float]
) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, G]; both ends of the range shrink together, and for few levels each end
    also alone.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    absmax = torch.maximum(low.abs(), high.abs())
    levels, best = scheme.levels, None
    sides = [(r, r) for r in ratios]
    if levels <= 8:
        coarse = ratios[:: max(1, len(ratios) // 8)]
        sides += [(a, b) for a in coarse for b in coarse if a != b]
    for down, up in sides:
        width = up * high / (levels - 1) - down * low / (levels - 1)
        scale = torch.maximum(width, absmax * _FLAT).clamp(min=TINY)
        zero = torch.round(-down * low / scale)
        codes = (torch.round(groups / scale[..., None]) + zero[..., None]).clamp_(0, levels - 1)
        error = (
            ((codes - zero[..., None]) * scale[..., None] - groups).square_().mul_(weights).sum(-1)
        )
        best = _better(best, error, scale, zero)
    assert best is not None
    return best[1], best[2]


def _search_qqq(
    groups: Tensor, weights: Tensor, scheme: QuantScheme, ratios: list[float]
) -> tuple[Tensor, Tensor]:
    """Signed scale [N, G] for codes -8..7."""
    low, high = groups.amin(-1), groups.amax(-1)
    sign = torch.where(high > -low, -1.0, 1.0)  # the wider side gets the level -8
    absmax, best = torch.maximum(low.abs(), high.abs()), None
    for ratio in ratios:
        # from "the farthest weight is code 7" (no clipping on either side) down through "it is code
        # -8"
        scale = sign * (ratio * absmax / _QQQ_HIGH).clamp(min=TINY)
        codes = torch.round(groups / scale[..., None]).clamp_(_QQQ_LOW, _QQQ_HIGH)
        error = (codes * scale[..., None] - groups).square_().mul_(weights).sum(-1)
        best = _better(best, error, scale, scale)
    assert best is not None
    return best[1], best[2]


def _better(
    best: tuple[Tensor, Tensor, Tensor] | None, error: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if best is None:
        return error, scale, zero
    won = error < best[0]
    return (
        torch.where(won, error, best[0]),
        torch.where(won, scale, best[1]),
        torch.where(won, zero, best[2]),
    )
