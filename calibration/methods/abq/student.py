"""The quantised block in training, the float block it learns from, and the task that both are made
of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calibration.blocks.forward import BlockWeights, Linear, block_output, float_linear
from calibration.families.decoder import Block
from calibration.methods.abq.quantizer import WeightQuantizer, quantize_dequantize_activation
from calibration.methods.abq.training import TrainSettings
from calibration.methods.abq.transforms import Compensation, EquivalentTransform, TransformParts
from calibration.quant.scheme import FLOAT_BITS, QuantScheme
from calibration.reference.steps import Context, Rope, attention_rows, cached_heads, run

__all__ = ["BlockTask", "QuantizedBlock", "Statistics", "Student", "Teacher", "keep"]


def keep(_: list[Tensor]) -> None:
    """The all_reduce of one process: the tensors are the average already."""


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to be trained, and what it is trained on.

    Attributes:
        name: of the block, for messages.
        block: its steps.
        weights: fp32 float weights; they also say on which device to compute.
        rope: position tables of a window.
        schemes: site -> QuantScheme of ABQGemm, for every site.
        x_fp: windows [L, hidden] fp32 of the float model's stream.
        x_q: the same windows of the quantised model's stream.
        compensation: add the rank-1 term to down_proj (the paper: in the first three and last four
            blocks).
        kv_bits: of keys and values, asymmetric per token and head; 16 leaves them.
        q_bits: of queries; 16 leaves them, as a cache of low bits does (the paper: as kv_bits).
        all_reduce: averages tensors over the processes in place.
        rank, world: this process and how many there are; window i is trained by process (i % batch)
            % world.
        seed: of the order of windows.
    """

    name: str
    block: Block
    weights: BlockWeights
    rope: Rope
    schemes: Mapping[str, QuantScheme]
    x_fp: Sequence[Tensor]
    x_q: Sequence[Tensor]
    compensation: bool = False
    kv_bits: int = FLOAT_BITS
    q_bits: int = FLOAT_BITS
    all_reduce: Callable[[list[Tensor]], None] = keep
    rank: int = 0
    world: int = 1
    seed: int = 0

    def window(self, windows: Sequence[Tensor], index: int) -> Tensor:
        """[1, L, hidden] fp32 on the block's device."""
        return windows[index].to(self.device)[None]

    @property
    def device(self) -> torch.device:
        """Where the block is computed."""
        return next(iter(self.weights.values())).device


@dataclass
class Statistics:
    """Of each site's input channels, [K]: largest magnitude and mean square."""

    absmax: dict[str, Tensor]
    square: dict[str, Tensor]


class Teacher:
    """The float block: its outputs on both streams, and attention rows on demand.

    Args:
        windows: the indices that this process trains; two outputs [L, hidden] are kept in memory
            for each.
    """

    def __init__(self, task: BlockTask, windows: Sequence[int], both: bool) -> None:
        self._task, self._linear = task, float_linear(task.weights, task.block)
        self.statistics = Statistics(self._nothing(), self._nothing())
        self._targets = {index: self._outputs(index, both) for index in windows}
        self._share()

    def targets(self, index: int) -> list[Tensor]:
        """Outputs [1, L, hidden] of the float block: on the float stream, and on the quantised one."""
        return [
            self._task.window(self._targets[index], part)
            for part in range(len(self._targets[index]))
        ]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def attention_rows(self, index: int, rows: Tensor) -> Tensor:
        """Log-probabilities of the float stream, [1, heads, rows, L]."""
        task = self._task
        context = Context(task.weights, task.rope, self._linear)
        made = run(task.block.before_attention, task.window(task.x_fp, index), context)
        assert made.heads is not None
        return attention_rows(*made.heads[:2], rows, task.block.attend)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _outputs(self, index: int, both: bool) -> list[Tensor]:
        task = self._task

        def output(windows: Sequence[Tensor], linear: Linear) -> Tensor:
            return block_output(
                task.window(windows, index), task.weights, linear, task.block, task.rope
            )[0].cpu()

        quantised = output(task.x_q, self._observed)
        if task.x_fp is task.x_q:
            return [quantised, quantised] if both else [quantised]
        return [output(task.x_fp, self._linear), *([quantised] if both else [])]

    def _nothing(self) -> dict[str, Tensor]:
        """What is known of sites that saw nothing, as experts may."""
        return {
            node: torch.zeros(site.linears.in_features, device=self._task.device)
            for node, site in self._task.block.sites.items()
        }

    def _observed(self, site: str, x: Tensor) -> Tensor:
        rows, known = x.flatten(0, -2), self.statistics
        known.absmax[site] = torch.maximum(known.absmax[site], rows.abs().amax(0))
        known.square[site] = known.square[site] + rows.square().mean(0)
        return self._linear(site, x)

    def _share(self) -> None:
        """Statistics over all processes, the same in each: everyone's maxima side by side, brought
        together by an average.
        """
        task, known = self._task, self.statistics
        for site in task.block.sites:
            everyone = known.absmax[site].new_zeros(task.world, len(known.absmax[site]))
            everyone[task.rank] = known.absmax[site] * task.world
            task.all_reduce([everyone, known.square[site]])
            known.absmax[site] = everyone.amax(0)
            known.square[site] *= task.world / len(task.x_q)


class QuantizedBlock(nn.Module):  # type: ignore[misc]
    """A block in training: forward() gives the weights that inference uses, outputs() what the
    block makes of a window with them.
    """

    def __init__(self, task: BlockTask) -> None:
        super().__init__()
        self._task = task

    def project(self) -> None:
        """After each step of the optimiser: back into the bounds of the parameters."""

    def groups(self, settings: TrainSettings, factor: float) -> list[dict[str, object]]:
        """Parameters with their learning rates times `factor`, for the optimiser."""
        learned = [
            (part.requires_grad_(rate > 0), rate)
            for part, rate in self.parts(settings)
            if part is not None
        ]
        return [
            {"params": found, "lr": rate * factor}
            for part, rate in learned
            if rate and (found := list(part.parameters()))
        ]

    def parts(self, settings: TrainSettings) -> list[tuple[nn.Module | None, float]]:
        """What is learned, and how fast."""
        raise TypeError("a block in training says what it learns")

    def outputs(
        self, weights: BlockWeights, x: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The quantised block's output [1, L, hidden], and log-probabilities of some attention rows
        [1, heads, rows, L].

        Args:
            weights: of forward().
            x: [1, L, hidden].
            rows: query positions; None for no attention rows.
        """
        task, multiply = self._task, float_linear(weights, self._task.block)
        cached = cached_heads(task.kv_bits, quantize_dequantize_activation)
        log_p: Tensor | None = None

        def linear(site: str, x: Tensor) -> Tensor:
            scheme = task.schemes[site]
            return multiply(
                site, quantize_dequantize_activation(x, scheme.abits, scheme.act_symmetric)
            )

        def heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal log_p
            query, key, value = cached(query, key, value)
            query = quantize_dequantize_activation(query, task.q_bits, False)
            if rows is not None:
                log_p = attention_rows(query, key, rows, task.block.attend)
            return query, key, value

        return block_output(x, weights, linear, task.block, task.rope, heads), log_p


class Student(QuantizedBlock):
    """The quantised block and everything about it that is learned.

    Args:
        parts: scales to learn; None for none.
        alpha: of their start.
    """

    def __init__(
        self, task: BlockTask, statistics: Statistics, parts: TransformParts | None, alpha: float
    ) -> None:
        super().__init__(task)
        if parts is not None and min(task.kv_bits, task.q_bits) >= FLOAT_BITS:
            parts = replace(parts, query_key=False)  # it would follow rounding noise
        self.transform = (
            None
            if parts is None
            else EquivalentTransform(task.weights, task.block, statistics.absmax, parts, alpha)
        )
        self.compensation = Compensation(task.weights, task.block) if task.compensation else None
        self._statistics = statistics
        self._names = {
            name: node for node, site in task.block.sites.items() for name in site.linears.names
        }
        self.quantizers = nn.ModuleList(
            WeightQuantizer(tuple(task.weights[f"{name}.weight"].shape), task.schemes[site])
            for name, site in self._names.items()
        ).to(task.device)
        for site in task.block.sites:
            self._search(site)

    def restart(self, site: str, power: float) -> None:
        """Put the scales of a site's input at a power of their start, and its clips at their best
        for that.
        """
        assert self.transform is not None
        self.transform.restart(site, power)
        self._search(site)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _search(self, site: str) -> None:
        folded, importance = self.folded(), self._statistics.square[site]
        scales = {} if self.transform is None else self.transform.columns()
        if site in scales:
            importance = importance / scales[site] ** 2
        for name in self._task.block.sites[site].linears.names:
            self.by_name()[name].search(folded[f"{name}.weight"], importance)

    def folded(self) -> BlockWeights:
        """Float weights, transformed and compensated."""
        weights = self._task.weights
        for part in (self.transform, self.compensation):
            weights = weights if part is None else part.apply_to(weights)
        return weights

    def forward(self) -> BlockWeights:
        """The weights that inference uses: folded(), each linear fake quantised."""
        weights = dict(self.folded())
        for name, quantizer in self.by_name().items():
            weights[f"{name}.weight"] = quantizer(weights[f"{name}.weight"])
        return weights

    def by_name(self) -> dict[str, WeightQuantizer]:
        """The quantisers by their linear's name."""
        return dict(zip(self._names, self.quantizers, strict=True))

    def project(self) -> None:
        """Keep the scales of the transforms away from 0."""
        if self.transform is not None:
            self.transform.project()

    def parts(self, settings: TrainSettings) -> list[tuple[nn.Module | None, float]]:
        """Scales of the transforms, clips, the rank-1 term."""
        return [
            (self.transform, settings.transform_rate),
            (self.quantizers, settings.clip_rate),
            (self.compensation, settings.compensation_rate),
        ]
