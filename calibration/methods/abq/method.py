"""The method's entry points: rotate, train transforms and clips, round on inputs as the quantised model sees them, tune the scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calibration.blocks.forward import INPUT_NORM, POST_NORM, QKV
from calibration.blocks.ranks import Ranks
from calibration.blocks.store import BlockResult
from calibration.blocks.streams import Windows
from calibration.blocks.walk import Streams, WalkBlock, walk
from calibration.methods.abq.losses import LossWeights
from calibration.methods.abq.student import BlockTask as TrainTask
from calibration.methods.abq.train import train_block, tune_block
from calibration.methods.abq.training import TrainSettings
from calibration.methods.abq.transforms import TransformParts
from calibration.methods.qqq import Qqq, SiteSolver
from calibration.settings import AbqSettings

if TYPE_CHECKING:
    import numpy as np

    from calibration.blocks.driver import BlockTask
    from calibration.settings import CalibrationSettings

__all__ = ["METHOD"]

_FIRST, _LAST = 3, 4  # blocks at either end whose down_proj is compensated


@dataclass(frozen=True)
class _AllWindows(Sequence[Tensor]):
    """A process's windows under their numbers among those of all processes."""

    mine: Windows
    ranks: Ranks

    def __len__(self) -> int:
        return len(self.mine) * self.ranks.world

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.mine[index // self.ranks.world]


class Abq(Qqq):
    """ABQ-LLM; basis as in QQQ."""

    def wants_real(self, settings: CalibrationSettings) -> bool:
        """For training and for the correction of earlier errors."""
        assert isinstance(settings.method, AbqSettings)
        return settings.method.epochs + settings.method.tune > 0 or super().wants_real(settings)

    def calibrate(self, task: BlockTask) -> BlockResult:
        """Train, walk, tune."""
        settings = task.settings.method
        assert isinstance(settings, AbqSettings)
        weights, scales = dict(task.weights), dict[str, Tensor]()
        report: dict[str, Any] = {}
        if settings.epochs:
            trained = train_block(_train_task(task), _train_settings(settings, settings.epochs))
            weights, scales = trained.weights, trained.scales
            report = {"train_before": trained.loss_before, "train_after": trained.loss_after, "notes": list(trained.notes)}
        gains = {f"{norm}.weight": weights[f"{norm}.weight"] for norm in (INPUT_NORM, POST_NORM)}
        solver = SiteSolver(task, weights)
        block = WalkBlock(task.weights, task.shape, task.rope, task.schemes, gains, scales)
        if not settings.tune:
            result = BlockResult(walk(block, task.streams, solver), _numpy(gains), {})
        else:
            sites = walk(block, _copied(task.streams), solver)
            tuned = tune_block(_train_task(task), _train_settings(settings, settings.tune), sites, gains)
            result = BlockResult(tuned.arrays, _numpy(tuned.gains), {"tune_before": tuned.loss_before, "tune_after": tuned.loss_after})
            report["notes"] = [*report.get("notes", ()), *tuned.notes]
            walk(replace(block, gains=tuned.gains, scales={}), task.streams, result.lookup, measure=False)
        found = solver.report()
        notes = [*report.pop("notes", ()), *solver.notes]
        return replace(result, report={**result.report, **report, **found, "notes": notes})


def _numpy(gains: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: gain.detach().cpu().numpy() for name, gain in gains.items()}


def _copied(streams: Streams) -> Streams:
    """The same activations, to be walked while the originals stay."""
    def copy(windows: Windows) -> Windows:
        fresh = streams.budget.windows(len(windows), windows.shape[1:], device=windows.device)
        for index, window in enumerate(windows):
            fresh[index] = window
        return fresh

    return Streams(copy(streams.quant), None if streams.real is None else copy(streams.real), streams.budget)


def _train_task(task: BlockTask) -> TrainTask:
    settings, ranks, streams = task.settings.method, task.ranks, task.streams
    assert isinstance(settings, AbqSettings) and streams.real is not None

    def average(tensors: list[Tensor]) -> None:
        ranks.sum(tensors)
        for tensor in tensors:
            tensor /= ranks.world

    ends = task.index < _FIRST or task.index >= task.count - _LAST
    return TrainTask(f"block {task.index + 1}", task.weights, task.shape, task.rope, task.schemes, _AllWindows(streams.real, ranks),
                     _AllWindows(streams.quant, ranks), compensation=settings.compensation and ends, kv_bits=task.schemes[QKV].kv_bits,
                     all_reduce=average, rank=ranks.rank, world=ranks.world, seed=task.settings.seed)


def _train_settings(settings: AbqSettings, epochs: int) -> TrainSettings:
    parts = None
    if settings.transforms:
        parts = TransformParts()
    return TrainSettings(epochs=epochs, batch=settings.batch, transform_rate=settings.transform_rate, clip_rate=settings.clip_rate,
                         compensation_rate=settings.compensation_rate, parts=parts, alpha=settings.alpha,
                         loss=LossWeights(settings.loss_error, settings.loss_direction, settings.loss_attention),
                         scale_rate=settings.scale_rate, gain_rate=settings.gain_rate)


METHOD = Abq()
