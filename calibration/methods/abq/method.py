"""The method's entry points: rotate, train transforms and clips, round on inputs as the quantised
model sees them, tune the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from calibration.blocks.forward import norm_gains
from calibration.blocks.ranks import Ranks
from calibration.blocks.rounding import RoundingMethod, SiteSolver, smoothed
from calibration.blocks.store import BlockResult
from calibration.blocks.streams import Windows
from calibration.blocks.walk import Streams, WalkBlock, walk
from calibration.methods.abq.losses import LossWeights
from calibration.methods.abq.student import BlockTask as TrainTask
from calibration.methods.abq.train import TrainedBlock, train_block, tune_block
from calibration.methods.abq.training import TrainSettings
from calibration.methods.abq.transforms import TransformParts
from calibration.methods.qqq.method import round as gptq_rule
from calibration.solvers.grid import Grid
from plugins import op_spec
from plugins.core.op_spec import QuantArrays

if TYPE_CHECKING:
    from calibration.blocks.driver import BlockTask
    from calibration.methods.abq.settings import AbqSettings
    from calibration.settings import CalibrationSettings

__all__ = ["METHOD"]

_TUNED_LEVELS = (
    5  # with more, rounding is too little of what is wrong with a block to pay for the time
)
_FIRST, _LAST = 3, 4  # blocks at either end whose down_proj is compensated


@dataclass(frozen=True)
class _AllWindows(Sequence[Tensor]):
    """A process's first windows under their numbers among those of all processes."""

    mine: Windows
    ranks: Ranks
    total: int  # of all processes

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.mine[index // self.ranks.world]


class Abq(RoundingMethod):
    """ABQ-LLM; basis and rounding rule as in QQQ."""

    def wants_real(self, settings: CalibrationSettings) -> bool:
        """For training and for the correction of earlier errors."""
        switches: AbqSettings = settings.method
        return switches.epochs + switches.tune > 0 or super().wants_real(settings)

    def calibrate(self, task: BlockTask) -> BlockResult:
        """Train, walk, tune."""
        settings: AbqSettings = task.settings.method
        weights, scales, grids = dict(task.weights), dict[str, Tensor](), dict[str, Grid]()
        report: dict[str, Any] = {}
        if settings.epochs:
            trained = train_block(_train_task(task), _train_settings(task, settings.epochs))
            weights, scales, grids = trained.weights, trained.scales, _learned_grids(trained, task)
            report = {
                "train_before": trained.loss_before,
                "train_after": trained.loss_after,
                "notes": list(trained.notes),
            }
        else:
            weights, scales = smoothed(task)
        gains = norm_gains(weights, task.block)
        solver = SiteSolver(task, weights, self.rule, grids)
        block = WalkBlock(task.block, task.weights, task.rope, task.schemes, gains, scales)
        if (
            not settings.tune
            or min(scheme.levels for scheme in task.schemes.values()) > _TUNED_LEVELS
        ):
            result = BlockResult(
                walk(block, task.streams, solver, say=solver.notes.append), _numpy(gains), {}
            )
        else:
            copied = _copied(task.streams)
            try:
                sites = walk(block, copied, solver, say=solver.notes.append)
            finally:
                for windows in (copied.quant, copied.real):
                    if windows is not None:
                        windows.close()
            tuned = tune_block(
                _train_task(task), _train_settings(task, settings.tune), sites, gains
            )
            result = BlockResult(
                tuned.arrays,
                _numpy(tuned.gains),
                {"tune_before": tuned.loss_before, "tune_after": tuned.loss_after},
            )
            report["notes"] = [*report.get("notes", ()), *tuned.notes]
            walk(
                replace(block, gains=tuned.gains, scales={}),
                task.streams,
                result.lookup,
                measure=False,
            )
        found = solver.report()
        notes = [*report.pop("notes", ()), *solver.notes]
        return replace(result, report={**result.report, **report, **found, "notes": notes})


def _learned_grids(trained: TrainedBlock, task: BlockTask) -> dict[str, Grid]:
    """Scales and zero points as training left them, members stacked."""
    grids: dict[str, Grid] = {}
    for node, site in task.block.sites.items():
        arrays = QuantArrays.stacked(
            [
                trained.quantizers[name].arrays(trained.weights[f"{name}.weight"])
                for name in site.linears.names
            ]
        )
        scheme = task.schemes[node]
        grids[node] = op_spec(scheme.op).grid_from_arrays(arrays, scheme.gemm, task.device)
    return grids


def _numpy(gains: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: gain.detach().cpu().numpy() for name, gain in gains.items()}


def _copied(streams: Streams) -> Streams:
    """The same activations, to be walked while the originals stay."""

    def copy(windows: Windows) -> Windows:
        fresh = streams.budget.windows(len(windows), windows.shape[1:], device=windows.device)
        for index, window in enumerate(windows):
            fresh[index] = window
        return fresh

    return Streams(
        copy(streams.quant),
        None if streams.real is None else copy(streams.real),
        streams.budget,
        streams.ranks,
    )


def _train_task(task: BlockTask) -> TrainTask:
    settings: AbqSettings = task.settings.method
    ranks, streams = task.ranks, task.streams
    assert streams.real is not None  # wants_real

    def average(tensors: list[Tensor]) -> None:
        ranks.sum(tensors)
        for tensor in tensors:
            tensor /= ranks.world

    most = min(task.windows, max(settings.train_windows, ranks.world))
    ends = task.block.index < _FIRST or task.block.index >= task.count - _LAST
    experts = task.block.branches[-1].experts is not None  # which have no down_proj that sees all
    real, quant = (_AllWindows(stream, ranks, most) for stream in (streams.real, streams.quant))
    return TrainTask(
        f"block {task.block.index + 1}",
        task.block,
        task.weights,
        task.rope,
        task.schemes,
        real,
        quant,
        all_reduce=average,
        compensation=settings.compensation and ends and not experts,
        kv_bits=task.kv_bits,
        rank=ranks.rank,
        world=ranks.world,
        seed=task.settings.seed,
    )


def _train_settings(task: BlockTask, epochs: int) -> TrainSettings:
    """With as many windows per step as were asked for, or the next number that the processes can
    share.
    """
    settings: AbqSettings = task.settings.method
    world = task.ranks.world
    parts = None
    if settings.transforms:
        parts = TransformParts()
    return TrainSettings(
        epochs=epochs,
        batch=max(1, -(-settings.batch // world)) * world,
        transform_rate=settings.transform_rate,
        clip_rate=settings.clip_rate,
        compensation_rate=settings.compensation_rate,
        parts=parts,
        alpha=settings.alpha,
        loss=LossWeights(settings.loss_error, settings.loss_direction, settings.loss_attention),
        scale_rate=settings.scale_rate,
        gain_rate=settings.gain_rate,
    )


METHOD = Abq(gptq_rule)
