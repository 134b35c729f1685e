"""Trains the learnable parts of one block until its quantised form gives the float block's output;
never ends worse than it starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibration.blocks.forward import BlockWeights
from calibration.methods.abq.losses import block_loss, sample_rows
from calibration.methods.abq.quantizer import WeightQuantizer
from calibration.methods.abq.student import BlockTask, QuantizedBlock, Student, Teacher
from calibration.methods.abq.training import TrainSettings
from calibration.methods.abq.tuned import TunedStudent
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

__all__ = ["BlockTask", "TrainSettings", "TrainedBlock", "TunedBlock", "train_block", "tune_block"]

_RETRY = 0.25  # of the learning rates, after a run that did not help


@dataclass(frozen=True)
class TunedBlock:
    """A block with trained scales and gains; codes and zero points are those it came with."""

    arrays: dict[str, QuantArrays]
    gains: dict[str, Tensor]
    loss_before: float
    loss_after: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TrainedBlock:
    """What training made of a block.

    Attributes:
        weights: float weights fp32 with everything learned folded in, not quantised.
        scales: of sites whose inputs became those of the float block divided by s [K].
        quantizers: linear name -> its clips; arrays(weights[name]) are the codes that were trained.
        loss_before, loss_after: mean loss over the windows; after is never above before.
        losses: after each epoch of the run that was kept.
        notes: what did not go as it should, in words.
    """

    weights: BlockWeights
    scales: dict[str, Tensor]
    quantizers: dict[str, WeightQuantizer]
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    notes: tuple[str, ...]


class _DivergedError(Exception):
    """A gradient is not finite."""


def train_block(task: BlockTask, settings: TrainSettings) -> TrainedBlock:
    """Train one block.

    The best epoch's parameters are kept, by the loss measured over all windows. A run with a
    gradient that is not finite, or with no epoch better than the start, is repeated at a quarter of
    the learning rates; after that the block keeps its start.

    Raises:
        InputError: windows that are missing or not finite, processes that do not divide the batch.
    """
    _check(task, settings)
    teacher = Teacher(task, _mine(task, settings), settings.both_streams)
    student = Student(task, teacher.statistics, settings.parts, settings.alpha)
    trainer = _Trainer(task, settings, teacher, student)
    losses, notes = trainer.train()
    student.requires_grad_(False)
    scales = {} if student.transform is None else student.transform.columns()
    return TrainedBlock(
        {name: tensor.contiguous() for name, tensor in student.folded().items()},
        scales,
        student.by_name(),
        trainer.loss_before,
        min(losses, default=trainer.loss_before),
        losses,
        notes,
    )


def tune_block(
    task: BlockTask,
    settings: TrainSettings,
    arrays: Mapping[str, QuantArrays],
    gains: Mapping[str, Tensor],
) -> TunedBlock:
    """Train the weight scales and norm gains of a block whose codes are final, against the same
    float block.

    Args:
        arrays: codes, scales and zero points by site; only the scales change.
        gains: norm gains of the quantised block.

    Raises:
        InputError: as train_block.
    """
    _check(task, settings)
    student = TunedStudent(task, arrays, gains)
    trainer = _Trainer(
        task, settings, Teacher(task, _mine(task, settings), settings.both_streams), student
    )
    losses, notes = trainer.train()
    return TunedBlock(
        student.arrays(),
        student.norm_gains(),
        trainer.loss_before,
        min(losses, default=trainer.loss_before),
        notes,
    )


def _mine(task: BlockTask, settings: TrainSettings) -> list[int]:
    return [
        index for index in range(len(task.x_q)) if index % settings.batch % task.world == task.rank
    ]


def _check(task: BlockTask, settings: TrainSettings) -> None:
    if len(task.x_fp) != len(task.x_q) or not len(task.x_q):
        raise InputError(
            task.name,
            f"got {len(task.x_fp)} float and {len(task.x_q)} quantised windows, expected as "
            f"many, at least 1",
            "Capture both streams over the same text",
        )
    if settings.batch % task.world or len(task.x_q) < settings.batch:
        raise InputError(
            task.name,
            f"got {settings.batch} windows per step for {task.world} processes and "
            f"{len(task.x_q)} windows in all, "
            "expected a multiple of the processes and no more than the windows",
            "Choose another batch",
        )


def _gradient(tensor: Tensor) -> Tensor:
    """Of a leaf; zeros where nothing reached it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class _Trainer:
    """The loop; `student` always holds the best parameters so far between runs."""

    def __init__(
        self, task: BlockTask, settings: TrainSettings, teacher: Teacher, student: QuantizedBlock
    ) -> None:
        self._task, self._settings, self._mine = task, settings, _mine(task, settings)
        self._teacher, self.student = teacher, student
        self._choose_start()
        self.loss_before = self._measure()
        if not math.isfinite(self.loss_before):
            raise InputError(
                task.name,
                f"got a loss of {self.loss_before} before training, expected a finite one",
                "Look for NaN or inf in the block's weights and in its input",
            )

    def train(self) -> tuple[tuple[float, ...], tuple[str, ...]]:
        """Losses per epoch of the run that was kept, and notes."""
        name, notes = self._task.name, list[str]()
        for factor in (1.0, _RETRY):
            with (
                sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext()
            ):  # the same gradients every time on a GPU
                losses, problem = self.run(factor)
            if not problem:
                return losses, tuple(notes)
            notes.append(f"{name}: at {factor:g} of the learning rates {problem}")
        return (), (*notes, f"{name}: kept as it was before training")

    def _choose_start(self) -> None:
        """Give each site, one after another, the power of its scales' start with the least loss of
        the block.
        """
        student = self.student
        if not isinstance(student, Student) or student.transform is None:
            return
        for site in student.transform.sites:
            losses = {}
            for power in self._settings.powers:
                student.restart(site, power)
                losses[power] = self._measure()
            student.restart(site, min(losses, key=losses.__getitem__))

    def run(self, factor: float) -> tuple[tuple[float, ...], str]:
        """Train from the start at `factor` of the learning rates: losses per epoch, and what went
        wrong or "".
        """
        start = best = deepcopy(self.student.state_dict())
        losses: list[float] = []
        groups = self.student.groups(self._settings, factor)
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

    def _steps(self, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches of windows: one of each of `batch` slots, so that a window belongs to the same
        process in every epoch.
        """
        batch, total = self._settings.batch, len(self._task.x_q)
        slots = [torch.arange(slot, total, batch) for slot in range(batch)]
        orders = [slot[torch.randperm(len(slot), generator=generator)].tolist() for slot in slots]
        for step in range(len(orders[0])):
            yield [order[step] for order in orders if step < len(order)]

    def _step(self, windows: list[int], optimizer: torch.optim.Optimizer) -> None:
        """One step: the weights are quantised once, and their gradient is summed window by window,
        so memory holds one window's graph.
        """
        optimizer.zero_grad(set_to_none=False)
        weights = self.student()
        reached = [name for name, tensor in weights.items() if tensor.requires_grad]
        gradients = self._weight_gradients(weights, windows)
        torch.autograd.backward(
            [weights[name] for name in reached], [gradients[name] for name in reached]
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = _gradient(parameter)
                if not torch.isfinite(parameter.grad).all():
                    raise _DivergedError
        optimizer.step()
        self.student.project()

    def _weight_gradients(self, weights: BlockWeights, windows: list[int]) -> dict[str, Tensor]:
        """Of the mean loss over some windows of all processes.

        Averaged here, where a window's gradient is a term of a sum: what follows is then the same
        arithmetic in every process, and two processes take the step of one. Averages of the
        parameters' gradients differ in their last bits, which move codes.
        """
        leaves = {
            name: tensor.detach().requires_grad_(tensor.requires_grad)
            for name, tensor in weights.items()
        }
        for index in filter(self._mine.__contains__, windows):
            (self._loss(leaves, index) * (self._task.world / len(windows))).backward()
        gradients = {name: _gradient(leaf) for name, leaf in leaves.items() if leaf.requires_grad}
        self._task.all_reduce(list(gradients.values()))
        return gradients

    def _loss(self, weights: BlockWeights, index: int) -> Tensor:
        task, settings = self._task, self._settings
        x, rows, attention = task.window(task.x_q, index), None, None
        if settings.loss.attention:
            rows = sample_rows(x.shape[1], settings.rows, index).to(x.device)
        y, log_p = self.student.outputs(weights, x, rows)
        if rows is not None and log_p is not None:
            attention = log_p, self._teacher.attention_rows(index, rows)
        return block_loss(y, self._teacher.targets(index), attention, settings.loss)

    def _measure(self) -> float:
        """Mean loss over the windows of all processes."""
        with torch.no_grad():
            weights = self.student()
            total = torch.stack([self._loss(weights, index) for index in self._mine]).sum()
        mean = total * (self._task.world / len(self._task.x_q))
        self._task.all_reduce([mean])
        return float(mean)
