"""The search for the grid, the scales and zero points, of least weighted error.

A grid is what the op can say and nothing else, so whatever is rounded on it reaches the kernel
untouched; the op makes it (plugins/<op>/grid.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plugins import op_spec
from plugins.core.grid import stacked_grids
from plugins.core.op_spec import Grid
from plugins.core.rounding import SMALLEST_SCALE

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["Grid", "column_groups", "search_grid"]

_CHUNK = 1 << 22  # weights searched together


def column_groups(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """The group of each column of a weight [N, K], int64 [K] on its device."""
    columns = weight.shape[1]
    return torch.arange(columns, device=weight.device) // (scheme.group_size or columns)


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
    op, size = op_spec(scheme.op), scheme.group_size or weight.shape[1]
    weights = (
        torch.ones(weight.shape[1], device=weight.device)
        if importance is None
        else importance.float()
    )
    weights = (weights / weights.mean().clamp(min=SMALLEST_SCALE)).unflatten(0, (-1, size))
    ratios = torch.linspace(1, 1 - shrink, steps).tolist() if steps > 1 else [1.0]
    parts = weight.unflatten(1, (-1, size)).split(max(1, _CHUNK // weight.shape[1]))
    return stacked_grids([op.search_grid(part, weights, ratios, scheme.gemm) for part in parts])
