"""What the grids of several ops share: the choice of the better clip, and scales fitted to codes by
least squares. Imports torch, so an op imports it where a grid is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from plugins.core.rounding import SMALLEST_SCALE

__all__ = ["better", "fitted_scales", "stacked_grids"]

_CHUNK = 1 << 22  # fp64 numbers of the normal equations held together
Best = tuple[Tensor, Tensor, Tensor]
GridT = TypeVar("GridT")


def stacked_grids(parts: Sequence[GridT]) -> GridT:
    """Grids (dataclasses) of consecutive output channels as one: tensors are joined along their
    first axis, everything else is that of the first part.
    """
    joined = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(parts[0])  # type: ignore[arg-type]
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    return replace(parts[0], **joined)  # type: ignore[type-var]


def better(best: Best | None, error: Tensor, first: Tensor, second: Tensor) -> Best:
    """(error, first, second), each [N, G], of whichever has the smaller error, group by group."""
    if best is None:
        return error, first, second
    won = error < best[0]
    return (
        torch.where(won, error, best[0]),
        torch.where(won, first, best[1]),
        torch.where(won, second, best[2]),
    )


def fitted_scales(integers: Tensor, weight: Tensor, hessian: Tensor, old: Tensor) -> Tensor:
    """Scales s [N, G] of least (w - sum_g s_g u_g) H (w - sum_g s_g u_g)^T for every row.

    A scale that would lose its sign or size, so that codes no longer mean what they did, stays.

    Args:
        integers: u_g, [N, G, group_len], such as code - zero point.
        weight: [N, K].
        hessian: H, [K, K].
        old: the scales so far, [N, G].
    """
    new = _least_squares(integers, weight, hessian)
    ratio = new / old
    near = torch.isfinite(ratio) & (ratio > 0.5) & (ratio < 2) & (new.abs() >= SMALLEST_SCALE)
    return torch.where(near, new, old)


def _least_squares(integers: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
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
        diagonal += 1e-6 * diagonal.amax(1, keepdim=True).clamp(min=SMALLEST_SCALE)
        found.append(torch.linalg.solve(normal, right))
    return torch.cat(found).float()
