"""Trains the learnable parts of one block until its quantised form gives the float block's output; never ends worse than it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calibration.blocks.forward import BlockWeights
from calibration.methods.abq.losses import LossWeights, block_loss, sample_rows
from calibration.methods.abq.quantizer import WeightQuantizer
from calibration.methods.abq.student import BlockTask, Student, Teacher
from calibration.methods.abq.transforms import TransformParts
from plugins.core.errors import InputError

__all__ = ["BlockTask", "TrainSettings", "TrainedBlock", "train_block"]

_RETRY = 0.25  # of the learning rates, after a run that did not help


@dataclass(frozen=True)
class TrainSettings:
    """How a block is trained; the defaults are ABQ-LLM's.

    Attributes:
        epochs: passes over the windows.
        batch: windows per step, over all processes.
        transform_rate, clip_rate, compensation_rate: learning rates of scales, clips and the rank-1 term; 0 keeps one at its start.
        parts: scales to learn; None leaves the float weights as they are.
        alpha: exponent of the scales' start.
        powers: of the start; with more than one, each site takes the one with the least loss before training.
        loss: factors of the loss terms.
        both_streams: compare also with the float block on the quantised stream.
        rows: attention rows per window in the attention term.
    """

    epochs: int = 20
    batch: int = 1
    transform_rate: float = 5e-3
    clip_rate: float = 1e-2
    compensation_rate: float = 1e-2
    parts: TransformParts | None = field(default_factory=TransformParts)
    alpha: float = 0.5
    powers: tuple[float, ...] = (1.0, 0.5, 0.0)
    loss: LossWeights = field(default_factory=LossWeights)
    both_streams: bool = True
    rows: int = 64


@dataclass(frozen=True)
class TrainedBlock:
    """What training made of a block.

    Attributes:
        weights: float weights fp32 with everything learned folded in, not quantised.
        quantizers: linear name -> its clips; arrays(weights[name]) are the codes that were trained.
        loss_before, loss_after: mean loss over the windows; after is never above before.
        losses: after each epoch of the run that was kept.
        notes: what did not go as it should, in words.
    """

    weights: BlockWeights
    quantizers: dict[str, WeightQuantizer]
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    notes: tuple[str, ...]


class _DivergedError(Exception):
    """A gradient is not finite."""


def train_block(task: BlockTask, settings: TrainSettings) -> TrainedBlock:
    """Train one block.

    The best epoch's parameters are kept, by the loss measured over all windows. A run with a gradient that is not finite, or with no
    epoch better than the start, is repeated at a quarter of the learning rates; after that the block keeps its start.

    Raises:
        InputError: windows that are missing or not finite, processes that do not divide the batch.
    """
    _check(task, settings)
    trainer = _Trainer(task, settings)
    notes = []
    for factor in (1.0, _RETRY):
        losses, problem = trainer.run(factor)
        if not problem:
            break
        notes.append(f"{task.name}: at {factor:g} of the learning rates {problem}")
    else:
        notes.append(f"{task.name}: kept as it was before training")
    student = trainer.student.requires_grad_(False)
    return TrainedBlock({name: tensor.contiguous() for name, tensor in student.folded().items()}, student.by_name(),
                        trainer.loss_before, min(losses, default=trainer.loss_before), losses, tuple(notes))


def _check(task: BlockTask, settings: TrainSettings) -> None:
    if len(task.x_fp) != len(task.x_q) or not len(task.x_q):
        raise InputError(task.name, f"got {len(task.x_fp)} float and {len(task.x_q)} quantised windows, expected as many, at least 1",
                         "Capture both streams over the same text")
    if settings.batch % task.world or len(task.x_q) < settings.batch:
        raise InputError(task.name, f"got {settings.batch} windows per step for {task.world} processes and {len(task.x_q)} windows in all, "
                         "expected a multiple of the processes and no more than the windows", "Choose another batch")


class _Trainer:
    """The loop; `student` always holds the best parameters so far between runs."""

    def __init__(self, task: BlockTask, settings: TrainSettings) -> None:
        self._task, self._settings = task, settings
        self._mine = [index for index in range(len(task.x_q)) if index % settings.batch % task.world == task.rank]
        self._teacher = Teacher(task, self._mine, settings.both_streams)
        self.student = Student(task, self._teacher.statistics, settings.parts, settings.alpha)
        self._choose_start()
        self.loss_before = self._measure()
        if not math.isfinite(self.loss_before):
            raise InputError(task.name, f"got a loss of {self.loss_before} before training, expected a finite one",
                             "Look for NaN or inf in the block's weights and in its input")

    def _choose_start(self) -> None:
        """Give each site, one after another, the power of its scales' start with the least loss of the block."""
        transform = self.student.transform
        for site in () if transform is None else transform.sites:
            losses = {}
            for power in self._settings.powers:
                self.student.restart(site, power)
                losses[power] = self._measure()
            self.student.restart(site, min(losses, key=losses.__getitem__))

    def run(self, factor: float) -> tuple[tuple[float, ...], str]:
        """Train from the start at `factor` of the learning rates: losses per epoch, and what went wrong or ""."""
        start = best = deepcopy(self.student.state_dict())
        losses: list[float] = []
        groups = self._groups(factor)
        if not groups:
            return (), ""
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        order = torch.Generator().manual_seed(self._task.seed)
        problem = ""
        try:
            for _ in range(self._settings.epochs):
                for windows in self._steps(order):
                    self._step(windows, optimizer)
                losses.append(self._measure())
                if losses[-1] < min([self.loss_before, *losses[:-1]]):
                    best = deepcopy(self.student.state_dict())
        except _DivergedError:
            problem = "a gradient was not finite"
        if best is start and not problem and self._settings.epochs:
            problem = f"the loss rose from {self.loss_before:.4g} to {losses[-1]:.4g}"
        self.student.load_state_dict(best if not problem else start)
        return tuple(losses) if not problem else (), problem

    def _groups(self, factor: float) -> list[dict[str, object]]:
        student, settings = self.student, self._settings
        parts: list[tuple[nn.Module | None, float]] = [(student.transform, settings.transform_rate),
                                                       (student.quantizers, settings.clip_rate),
                                                       (student.compensation, settings.compensation_rate)]
        learned = [(part.requires_grad_(rate > 0), rate) for part, rate in parts if part is not None]
        groups = [{"params": list(part.parameters()), "lr": rate * factor} for part, rate in learned if rate]
        return [group for group in groups if group["params"]]

    def _steps(self, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches of windows: one of each of `batch` slots, so that a window belongs to the same process in every epoch."""
        batch, total = self._settings.batch, len(self._task.x_q)
        slots = [torch.arange(slot, total, batch) for slot in range(batch)]
        orders = [slot[torch.randperm(len(slot), generator=generator)].tolist() for slot in slots]
        for step in range(len(orders[0])):
            yield [order[step] for order in orders if step < len(order)]

    def _step(self, windows: list[int], optimizer: torch.optim.Optimizer) -> None:
        """One step: the weights are quantised once, and their gradient is summed window by window, so memory holds one window's graph."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.zero_grad(set_to_none=False)
        weights = self.student()
        leaves = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in weights.items()}
        for index in filter(self._mine.__contains__, windows):
            (self._loss(leaves, index) * (self._task.world / len(windows))).backward()
        reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([weights[name] for name in reached], [leaves[name].grad for name in reached])
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
        self._task.all_reduce(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise _DivergedError
            parameter.grad = gradient
        optimizer.step()
        if self.student.transform is not None:
            self.student.transform.project()

    def _loss(self, weights: BlockWeights, index: int) -> Tensor:
        task, settings = self._task, self._settings
        x = task.window(task.x_q, index)
        rows = sample_rows(x.shape[1], settings.rows, index).to(x.device) if settings.loss.attention else None
        y, log_p = self.student.outputs(weights, x, rows)
        attention = None if rows is None or log_p is None else (log_p, self._teacher.attention_rows(index, rows))
        return block_loss(y, self._teacher.targets(index), attention, settings.loss)

    def _measure(self) -> float:
        """Mean loss over the windows of all processes."""
        with torch.no_grad():
            weights = self.student()
            total = torch.stack([self._loss(weights, index) for index in self._mine]).sum()
        mean = total * (self._task.world / len(self._task.x_q))
        self._task.all_reduce([mean])
        return float(mean)
