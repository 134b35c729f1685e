"""QQQ's rounding rule, GPTQ: the best of the nearest codes, GPTQ's, and GPTQ's on scales that were
fitted to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from calibration.blocks.rounding import Rounded, SiteGrid
from calibration.solvers.gptq import factored, gptq, quadratic_error

if TYPE_CHECKING:
    from calibration.methods.qqq.settings import QqqSettings

__all__ = ["round"]


def round(target: Tensor, hessian: Tensor, grid: SiteGrid, settings: QqqSettings) -> Rounded:
    """Codes and scales of least squared output error."""

    def judged(codes: Tensor, grid: SiteGrid) -> tuple[float, Tensor, SiteGrid]:
        return quadratic_error(target, grid.values(codes), hessian), codes, grid

    best, note = judged(grid.round(target), grid), ""
    ready = factored(hessian, settings.damp, settings.act_order)
    for _ in range(settings.gptq * (1 + settings.refits)):
        result = gptq(target, ready, grid.grid, grid.group)
        best = min(best, judged(result.codes, grid), key=lambda found: found[0])
        if result.note:
            note = result.note
            break
        grid = grid.refitted(target, result.codes, hessian)
        best = min(best, judged(result.codes, grid), key=lambda found: found[0])
    return Rounded(best[1], best[2], note)
