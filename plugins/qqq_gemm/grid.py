"""What QQQGemm can say of a weight matrix: two levels of scales, with a rounding to int8 between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plugins.core.grid import better, fitted_scales
from plugins.core.op_spec import QuantArrays
from plugins.core.rounding import SMALLEST_SCALE
from plugins.qqq_gemm.layout import HIGHEST, INT8_MAX, LOWEST

__all__ = ["QqqGrid", "grid_from_arrays", "search"]


@dataclass(frozen=True)
class QqqGrid:
    """w = channel * code, or channel * round(code * group): int8 weights from codes -8..7, the
    second rounding being part of the grid; see Grid.

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
        """Codes and values of weights."""
        channel = self.channel[:, 0] if weight.ndim == 1 else self.channel
        if self.group is None:
            codes = torch.round(weight / channel).clamp(LOWEST, HIGHEST)
            return codes, codes * channel
        step = self.group[:, group]
        integer = weight / channel
        codes = torch.round(integer / step).clamp(LOWEST, HIGHEST)
        return codes, _int8(codes, step) * channel

    def values(self, codes: Tensor, group: Tensor) -> Tensor:
        """Weights [N, K] that codes [N, K] stand for."""
        return (
            codes * self.channel
            if self.group is None
            else _int8(codes, self.group[:, group]) * self.channel
        )

    def refitted(self, weight: Tensor, codes: Tensor, hessian: Tensor) -> QqqGrid:
        """Other channel scales; group scales, which make int8 weights, stay."""
        group = torch.arange(codes.shape[1], device=codes.device) // (
            codes.shape[1] // (1 if self.group is None else self.group.shape[1])
        )
        integers = self.values(codes, group) / self.channel
        return replace(
            self, channel=fitted_scales(integers[:, None], weight, hessian, self.channel)
        )

    def arrays(self, codes: Tensor, bias: Tensor | None) -> QuantArrays:
        """What the quant folder stores."""
        return QuantArrays(
            codes=codes.to(torch.int8).cpu().numpy(),
            scale=self.channel.float().cpu().numpy(),
            scale_group=None if self.group is None else self.group.half().cpu().numpy(),
            bias=None if bias is None else bias.float().cpu().numpy(),
        )


def _int8(codes: Tensor, step: Tensor) -> Tensor:
    return torch.round(codes * step).clamp(-INT8_MAX, INT8_MAX)


def grid_from_arrays(arrays: QuantArrays, device: str) -> QqqGrid:
    """The grid of these scales."""
    channel, group = (
        None if array is None else torch.from_numpy(array).float().to(device)
        for array in (arrays.scale, arrays.scale_group)
    )
    assert channel is not None
    return QqqGrid(channel, group)


def search(groups: Tensor, importance: Tensor, ratios: Sequence[float], per_group: bool) -> QqqGrid:
    """See OpSpec.search_grid: signed scales for codes -8..7, and then their two levels."""
    low, high = groups.amin(-1), groups.amax(-1)
    sign = torch.where(high > -low, -1.0, 1.0)  # the wider side gets the level -8
    absmax, best = torch.maximum(low.abs(), high.abs()), None
    for ratio in ratios:
        # from "the farthest weight is code 7" (no clipping on either side) down through "it is code
        # -8"
        scale = sign * (ratio * absmax / HIGHEST).clamp(min=SMALLEST_SCALE)
        codes = torch.round(groups / scale[..., None]).clamp_(LOWEST, HIGHEST)
        error = (codes * scale[..., None] - groups).square_().mul_(importance).sum(-1)
        best = better(best, error, scale, scale)
    assert best is not None
    scale = best[1]
    if not per_group:
        return QqqGrid(scale, None)
    # int8 weights: |code * group| <= 127 for the farthest code of each group's sign, so that
    # nothing is clipped.
    channel = (scale.abs() * -LOWEST).amax(1, keepdim=True).clamp(min=SMALLEST_SCALE) / INT8_MAX
    group = (scale / channel).half().float()
    return QqqGrid(
        channel, torch.where(group == 0, 1.0, group)
    )  # a group far below the row's others: its codes are 0 with any scale
