"""QQQ (arXiv 2406.09904): W4A8 by smoothing or rotation, then GPTQ on inputs as the quantised model
sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibration.blocks.forward import load_block, norm_gains
from calibration.blocks.store import BlockResult
from calibration.blocks.walk import WalkBlock, site_weight, walk
from calibration.settings import QqqSettings
from calibration.solvers.gptq import factored, gptq, quadratic_error
from calibration.solvers.grid import Grid, search_grid
from calibration.solvers.hessian import Moments, corrected_target
from calibration.transforms.rotation import Rotation, obstacle
from calibration.transforms.smoothing import adaptive_scales, fold_scales, smoothed_sites
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.blocks.driver import Basis, BlockTask
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.settings import CalibrationSettings
    from plugins.core.op_spec import QuantArrays

__all__ = ["METHOD", "Plain", "Qqq", "SiteSolver", "smoothed"]


class Plain:
    """The checkpoint's own coordinates."""

    unties = False

    def load(self, checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
        """Weights of a block, fp32."""
        return load_block(checkpoint, index)

    def tensor(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """A tensor outside the blocks, fp32."""
        return checkpoint.tensor(name)


def smoothed(task: BlockTask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The block with the sites of the switch `smooth` smoothed, and their scales."""
    assert isinstance(task.settings.method, QqqSettings)
    sites = smoothed_sites(task.settings.method.smooth, task.block)
    scales = adaptive_scales(task, sites) if sites else {}
    return fold_scales(task.weights, scales, task.block), scales


class SiteSolver:
    """Codes of a site from its float weight and the moments of its inputs; adds up what rounding
    costs.

    Args:
        task: the block.
        weights: float weights with every fold done; `walk`'s moments are in the same coordinates.
        grids: of sites whose grid is known; the others' are searched.
    """

    def __init__(
        self, task: BlockTask, weights: dict[str, Tensor], grids: Mapping[str, Grid] | None = None
    ) -> None:
        self._task, self._weights, self._grids = task, weights, grids or {}
        assert isinstance(task.settings.method, QqqSettings)
        self._settings = task.settings.method
        self.before = self.after = self.signal = 0.0
        self.notes: list[str] = []

    def __call__(self, site: str, moments: Moments | None) -> QuantArrays:
        assert moments is not None
        settings, scheme = self._settings, self._task.schemes[site]
        moments.reduce(self._task.ranks)
        if not torch.isfinite(
            moments.hessian
        ).all():  # an activation overflowed: as if nothing had been seen
            moments = Moments(len(moments.hessian), cross=False, device=self._task.device)
        weight, bias = site_weight(self._weights, self._task.block.sites[site].linears)
        group = torch.arange(weight.shape[1], device=weight.device) // (
            scheme.group_size or weight.shape[1]
        )
        target = corrected_target(weight, moments, settings.correct)
        grid = self._grids.get(site) or search_grid(
            target, scheme, torch.diagonal(moments.hessian), settings.clip_steps
        )
        codes, values = grid.round(target, group)
        self.signal += quadratic_error(target, torch.zeros_like(target), moments.hessian)
        self.before += (plain := quadratic_error(target, values, moments.hessian))
        best = (plain, codes, grid)
        hessian = factored(moments.hessian, settings.damp, settings.act_order)
        for _ in range(settings.gptq * (1 + settings.refits)):
            result = gptq(target, hessian, grid, group)
            best = min(
                best,
                (quadratic_error(target, result.values, moments.hessian), result.codes, grid),
                key=lambda found: found[0],
            )
            if result.note:
                self.notes.append(f"{site}: {result.note}")
                break
            grid = grid.refitted(target, result.codes, moments.hessian)
            refitted = quadratic_error(target, grid.values(result.codes, group), moments.hessian)
            best = min(best, (refitted, result.codes, grid), key=lambda found: found[0])
        self.after += best[0]
        return best[2].arrays(best[1], bias)

    def report(self) -> dict[str, object]:
        """Squared output errors of all sites before and after GPTQ, as parts of the outputs'
        squares.
        """
        signal = max(self.signal, 1e-300)
        return {
            "loss_before": self.before / signal,
            "loss_after": self.after / signal,
            "notes": self.notes,
        }


class Qqq:
    """The method's entry points, see BlockMethod."""

    def basis(self, checkpoint: Checkpoint, settings: CalibrationSettings) -> Basis:
        """Rotated, unless switched off."""
        assert isinstance(settings.method, QqqSettings)
        if settings.method.rotation == "none":
            return Plain()
        decoder = checkpoint.decoder
        if problem := obstacle(decoder):
            raise InputError(
                f"rotation={settings.method.rotation}",
                f"got a decoder whose residual stream cannot be rotated ({problem}), "
                f"expected norm, linears and sum in every branch",
                "Add --set rotation=none",
            )
        head_dim = decoder.blocks[0].heads.head_dim
        return Rotation.make(settings.method.rotation, decoder.hidden, head_dim, settings.seed)

    def wants_real(self, settings: CalibrationSettings) -> bool:
        """For the correction of earlier errors."""
        assert isinstance(settings.method, QqqSettings)
        return settings.method.correct > 0

    def calibrate(self, task: BlockTask) -> BlockResult:
        """Smooth, then GPTQ site by site."""
        weights, scales = smoothed(task)
        gains = norm_gains(weights, task.block)
        solver = SiteSolver(task, weights)
        sites = walk(
            WalkBlock(task.block, task.weights, task.rope, task.schemes, gains, scales),
            task.streams,
            solver,
        )
        return BlockResult(
            sites, {name: gain.cpu().numpy() for name, gain in gains.items()}, solver.report()
        )


METHOD = Qqq()
