"""What ABQGemm can say of a weight matrix: any scale and integer zero point for every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plugins.abq_gemm.rounding import FLAT
from plugins.core.grid import better, fitted_scales
from plugins.core.op_spec import QuantArrays
from plugins.core.rounding import SMALLEST_SCALE

__all__ = ["AbqGrid", "grid_from_arrays", "search"]

_ONE_SIDED = 8  # up to as many levels each end of the range is also clipped alone


@dataclass(frozen=True)
class AbqGrid:
    """w = scale * (code - zero), code in 0..levels-1; see Grid.

    Attributes:
        scale, zero: fp32 [N, G]; zero holds integers and may lie outside the codes.
        levels: number of codes.
    """

    scale: Tensor
    zero: Tensor
    levels: int

    def round(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of weights."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        codes = (torch.round(weight / scale) + zero).clamp(0, self.levels - 1)
        return codes, (codes - zero) * scale

    def values(self, codes: Tensor, group: Tensor) -> Tensor:
        """Weights [N, K] that codes [N, K] stand for."""
        return (codes - self.zero[:, group]) * self.scale[:, group]

    def refitted(self, weight: Tensor, codes: Tensor, hessian: Tensor) -> AbqGrid:
        """The same zero points with other scales, over all groups of a row at once."""
        integers = codes.unflatten(1, (self.scale.shape[1], -1)) - self.zero[..., None]
        return replace(self, scale=fitted_scales(integers, weight, hessian, self.scale))

    def arrays(self, codes: Tensor, bias: Tensor | None) -> QuantArrays:
        """What the quant folder stores."""
        return QuantArrays(
            codes=codes.to(torch.uint8).cpu().numpy(),
            scale=self.scale.float().cpu().numpy(),
            zero=self.zero.to(torch.int32).cpu().numpy(),
            bias=None if bias is None else bias.float().cpu().numpy(),
        )


def grid_from_arrays(arrays: QuantArrays, levels: int, device: str) -> AbqGrid:
    """The grid of these scales and zero points."""
    assert arrays.zero is not None
    scale, zero = (
        torch.from_numpy(array).float().to(device) for array in (arrays.scale, arrays.zero)
    )
    return AbqGrid(scale, zero, levels)


def search(groups: Tensor, importance: Tensor, ratios: Sequence[float], levels: int) -> AbqGrid:
    """See OpSpec.search_grid; both ends of the range shrink together, and for few levels each end
    also alone.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    absmax, best = torch.maximum(low.abs(), high.abs()), None
    sides = [(ratio, ratio) for ratio in ratios]
    if levels <= _ONE_SIDED:
        coarse = ratios[:: max(1, len(ratios) // 8)]
        sides += [(a, b) for a in coarse for b in coarse if a != b]
    for down, up in sides:
        width = up * high / (levels - 1) - down * low / (levels - 1)
        scale = torch.maximum(width, absmax * FLAT).clamp(min=SMALLEST_SCALE)
        zero = torch.round(-down * low / scale)
        codes = (torch.round(groups / scale[..., None]) + zero[..., None]).clamp_(0, levels - 1)
        error = (
            ((codes - zero[..., None]) * scale[..., None] - groups)
            .square_()
            .mul_(importance)
            .sum(-1)
        )
        best = better(best, error, scale, zero)
    assert best is not None
    return AbqGrid(best[1], best[2], levels)
