"""A calibration made of a rounding rule: rotate or smooth, aim at the float model's outputs, find a
grid, round site by site on inputs as the quantised model sees them.

A rule is a function `round(target, hessian, grid) -> codes`, docs/methods.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibration.blocks.forward import load_block, norm_gains
from calibration.blocks.store import BlockResult
from calibration.blocks.walk import WalkBlock, site_weight, walk
from calibration.solvers.gptq import NO_INPUTS, quadratic_error, says_something
from calibration.solvers.grid import Grid, column_groups, search_grid
from calibration.solvers.hessian import Moments, corrected_target
from calibration.transforms.rotation import Rotation, obstacle
from calibration.transforms.smoothing import adaptive_scales, fold_scales, smoothed_sites
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.blocks.driver import Basis, BlockTask
    from calibration.blocks.head import HeadTask
    from calibration.blocks.settings import WalkSettings
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.scheme import QuantScheme
    from calibration.settings import CalibrationSettings

__all__ = [
    "Plain",
    "Rounded",
    "RoundingMethod",
    "SiteGrid",
    "SiteSolver",
    "smoothed",
]

_HEAD_WEIGHTS = 1 << 22  # that are rounded together, more for wide rows: fp64 copies are made


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
    which = task.settings.method.smooth
    sites = smoothed_sites(which, task.block)
    if which != "none" and not sites:
        raise InputError(
            f"smooth={which}",
            f"got {task.block.prefix}, where nothing takes the scales of such a site in, expected "
            "norms, values or gates in front of it",
            "Add --set smooth=none",
        )
    scales = adaptive_scales(task, sites) if sites else {}
    return fold_scales(task.weights, scales, task.block), scales


# ---------------------------------------------------------------- what a rule gets and gives


@dataclass(frozen=True)
class SiteGrid:
    """What the op can say of one site's weights [N, K]: the codes, and the weight that each stands
    for.

    Attributes:
        grid: scales and zero points.
        group: the group of each column, int64 [K].
        generator: random numbers that --seed, the block and the site fix, so that resumed runs and
            several processes draw the same.
    """

    grid: Grid
    group: Tensor
    generator: torch.Generator

    def round(self, weight: Tensor, columns: int | slice | Tensor = slice(None)) -> Tensor:
        """The nearest codes, integers as fp32: of weights [N, K], of some columns' [N, n], or of one
        column's [N].
        """
        if isinstance(columns, int):
            return self.round(weight[:, None], torch.tensor([columns]))[:, 0]
        return self.grid.round(weight.float(), self.group[columns])[0]

    def values(self, codes: Tensor, columns: int | slice | Tensor = slice(None)) -> Tensor:
        """The weights that codes of the same shapes stand for, fp32."""
        if isinstance(columns, int):
            return self.values(codes[:, None], torch.tensor([columns]))[:, 0]
        return self.grid.values(codes.float(), self.group[columns])

    def refitted(self, target: Tensor, codes: Tensor, hessian: Tensor) -> SiteGrid:
        """The scales that suit these codes best, by least squares under the Hessian."""
        return replace(self, grid=self.grid.refitted(target, codes, hessian))

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest code: those of weights that are infinitely far away."""
        far = torch.tensor([[-torch.inf, torch.inf]], device=self.group.device)
        codes = self.grid.round(far, self.group[[0, 0]])[0]
        return int(codes.min()), int(codes.max())


@dataclass(frozen=True)
class Rounded:
    """What a rule may give instead of bare codes.

    Attributes:
        codes: [N, K], integers of any type.
        grid: the one that they are on, where the rule has changed its scales.
        note: what went otherwise than planned, for the report.
    """

    codes: Tensor
    grid: SiteGrid
    note: str = ""


Rule = Callable[[Tensor, Tensor, SiteGrid, Any], "Tensor | Rounded"]


def _checked(found: object, target: Tensor, grid: SiteGrid, where: str) -> Rounded:
    """What a rule gave, with codes as fp32.

    Raises:
        InputError: they are no codes of this grid.
    """
    rounded = found if isinstance(found, Rounded) else Rounded(found, grid)  # type: ignore[arg-type]
    codes, fix = rounded.codes, "Let round give what grid.round gives, or such codes changed"
    shape = f"codes {list(target.shape)}"
    if not isinstance(codes, Tensor):
        raise InputError(where, f"got {type(codes).__name__}, expected a tensor of {shape}", fix)
    if codes.shape != target.shape or codes.is_complex():
        got = f"{str(codes.dtype).removeprefix('torch.')} {list(codes.shape)}"
        raise InputError(where, f"got {got}, expected {shape}", fix)
    codes = codes.detach().to(target.device, torch.float32)
    low, high = rounded.grid.ends
    wrong = ~((codes >= low) & (codes <= high) & (codes == codes.round()))  # NaN is wrong too
    if wrong.any():
        row, column = (int(place) for place in wrong.nonzero()[0])
        raise InputError(
            where,
            f"got code {codes[row, column]:g} at [{row}, {column}], expected whole numbers from "
            f"{low} to {high}",
            fix,
        )
    return replace(rounded, codes=codes)


class WeightSolver:
    """Codes of weights from the moments of their inputs; adds up what rounding costs.

    Args:
        settings: of the calibration.
        index: of the block, which is part of what fixes random numbers.
        rule: rounds them.
        grids: of sites whose grid is known; the others' are searched.
    """

    def __init__(
        self,
        settings: CalibrationSettings,
        index: int,
        rule: Rule,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        self._calibration, self._index, self._rule, self._grids = settings, index, rule, grids or {}
        self._settings: WalkSettings = settings.method
        self.before = self.after = self.signal = 0.0
        self.notes: list[str] = []

    def solve(
        self,
        site: str,
        weight: Tensor,
        bias: Tensor | None,
        scheme: QuantScheme,
        moments: Moments,
    ) -> QuantArrays:
        """The arrays of a weight [N, K] from what all its inputs were; keeps the errors before and
        after.
        """
        if not torch.isfinite(
            moments.hessian
        ).all():  # an activation overflowed: as if nothing had been seen
            moments = Moments(len(moments.hessian), cross=False, device=str(weight.device))
        target = corrected_target(weight, moments, self._settings.correct)
        found = self._grids.get(site) or search_grid(
            target, scheme, torch.diagonal(moments.hessian), self._settings.clip_steps
        )
        generator = self._generator(site, str(weight.device))
        grid = SiteGrid(found, column_groups(weight, scheme), generator)
        nearest = Rounded(grid.round(target), grid)
        where = f"method {scheme.method!r}, {site} of block {self._index + 1}"
        rounded = self._rounded(where, target, moments.hessian, nearest)

        def error(values: Tensor) -> float:
            return quadratic_error(target, values, moments.hessian)

        self.signal += error(torch.zeros_like(target))
        self.before += error(grid.values(nearest.codes))
        self.after += error(rounded.grid.values(rounded.codes))
        if rounded.note:
            self.notes.append(f"{site}: {rounded.note}")
        return rounded.grid.grid.arrays(rounded.codes, bias)

    def _generator(self, site: str, device: str) -> torch.Generator:
        place = f"{self._calibration.seed}/{self._index}/{site}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7])
        return torch.Generator(device).manual_seed(seed)

    def _rounded(self, where: str, target: Tensor, hessian: Tensor, nearest: Rounded) -> Rounded:
        """By the rule, where there is anything that it could go by."""
        if not says_something(hessian):
            return replace(nearest, note=NO_INPUTS)
        given = {"target": target, "hessian": hessian}
        versions = {name: tensor._version for name, tensor in given.items()}
        found = self._rule(target, hessian, nearest.grid, self._settings)
        for name, tensor in given.items():
            if tensor._version != versions[name]:
                raise InputError(
                    where,
                    f"got a {name} that round has changed in place, expected it as it was",
                    f"Work on {name}.clone()",
                )
        return _checked(found, target, nearest.grid, where)

    def report(self) -> dict[str, object]:
        """Squared output errors of all sites, of the nearest codes and of those that were kept, as
        parts of the outputs' squares.
        """
        signal = max(self.signal, 1e-300)
        return {
            "loss_before": self.before / signal,
            "loss_after": self.after / signal,
            "notes": self.notes,
        }


class SiteSolver(WeightSolver):
    """Codes of a block's sites.

    Args:
        task: the block.
        weights: float weights with every fold done; `walk`'s moments are in the same coordinates.
        rule, grids: of WeightSolver.
    """

    def __init__(
        self,
        task: BlockTask,
        weights: dict[str, Tensor],
        rule: Rule,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        super().__init__(task.settings, task.block.index, rule, grids)
        self._task, self._weights = task, weights

    def __call__(self, site: str, moments: Moments | None) -> QuantArrays:
        """The arrays of one site from what this process saw of its inputs."""
        assert moments is not None
        moments.reduce(self._task.ranks)
        weight, bias = site_weight(self._weights, self._task.block.sites[site].linears)
        return self.solve(site, weight, bias, self._task.schemes[site], moments)


class RoundingMethod:
    """The BlockMethod of a rule."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def rotation(self, settings: CalibrationSettings) -> str:
        """As the switch says."""
        return str(settings.method.rotation)

    def basis(self, checkpoint: Checkpoint, settings: CalibrationSettings) -> Basis:
        """Rotated, unless switched off."""
        kind = self.rotation(settings)
        if kind == "none":
            return Plain()
        decoder = checkpoint.decoder
        if kind != "values" and (problem := obstacle(decoder)):
            raise InputError(
                f"rotation={kind}",
                f"got a decoder whose residual stream cannot be rotated ({problem}), "
                f"expected norm, linears and sum in every branch",
                "Add --set rotation=values, which rotates value heads alone, or rotation=none",
            )
        head_dim = decoder.blocks[0].heads.head_dim
        return Rotation.make(kind, decoder.hidden, head_dim, settings.seed)

    def wants_real(self, settings: CalibrationSettings) -> bool:
        """For the correction of earlier errors."""
        return bool(settings.method.correct > 0)

    def calibrate(self, task: BlockTask) -> BlockResult:
        """Smooth, then round site by site."""
        weights, scales = smoothed(task)
        gains = norm_gains(weights, task.block)
        solver = SiteSolver(task, weights, self.rule)
        sites = walk(
            WalkBlock(task.block, task.weights, task.rope, task.schemes, gains, scales),
            task.streams,
            solver,
            say=solver.notes.append,
        )
        return BlockResult(
            sites, {name: gain.cpu().numpy() for name, gain in gains.items()}, solver.report()
        )

    def head(self, task: HeadTask) -> QuantArrays:
        """Round some rows of the table after the other, so that memory stays bounded."""
        solver, moments = WeightSolver(task.settings, task.index, self.rule), task.moments()
        width = task.table.shape[1]
        rows = max(2 * width, _HEAD_WEIGHTS // width)  # factoring the Hessian costs like `width`
        return QuantArrays.stacked(
            [
                solver.solve(task.head.name, part, None, task.scheme, moments)
                for part in task.table.split(rows)
            ]
        )
