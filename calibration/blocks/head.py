"""Quantises the head on what the quantised blocks hand it, and measures what that costs in
perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.blocks.store import BlockResult
from calibration.quant.scheme import FLOAT_BITS, QuantLinear, QuantScheme
from calibration.reference.fake_quant import Activation, ActivationQuantizer, FakeQuantLinear
from calibration.reference.steps import PLAIN
from calibration.solvers.hessian import Moments

if TYPE_CHECKING:
    from calibration.blocks.ranks import Ranks
    from calibration.blocks.walk import Streams
    from calibration.families.decoder import Head
    from calibration.settings import CalibrationSettings
    from plugins.core.op_spec import QuantArrays

__all__ = ["HeadMethod", "HeadTask", "quantise_head"]

_HELD_OUT = 8  # every so many windows one is kept out of the moments, to measure on
_LOGITS = 1 << 22  # that are in memory together, several times over
_ROWS = 1 << 12  # of the table that become a linear together: fp32 copies are made
_LARGEST_EXPONENT = 700.0  # of e in fp64


@dataclass(frozen=True, kw_only=True)
class HeadTask:
    """The head for a method to quantise.

    Attributes:
        head: its declaration.
        index: the number of blocks before it.
        gain: of the final norm, [hidden], in the method's basis.
        table: float weights [vocab, hidden] in the basis.
        scheme: how it is to be quantised.
        limit: the largest rise of perplexity, relative; None: any.
        streams: this process's residual streams behind the last block.
        tokens: of these windows, int64 [n, L].
        numbers: of these windows among those of all processes.
        settings: all settings.
        ranks: the processes that share the windows.
        windows: how many all of them have.
    """

    head: Head
    index: int
    gain: Tensor
    table: Tensor
    scheme: QuantScheme
    limit: float | None
    streams: Streams
    tokens: Tensor
    numbers: Sequence[int]
    settings: CalibrationSettings
    ranks: Ranks
    windows: int

    @property
    def device(self) -> str:
        """Where it is computed."""
        return str(self.gain.device)

    def inputs(self, window: Tensor) -> Tensor:
        """What the head reads of a window of a stream, [L, hidden] -> the same."""
        return PLAIN.norm(window, self.head.norm, self.gain)

    def held_out(self, number: int) -> bool:
        """Whether a window is measured on instead of calibrated with; of few windows all are both."""
        return number % _HELD_OUT == _HELD_OUT - 1

    def moments(self) -> Moments:
        """Of its inputs, over the windows of all processes that are not held out."""
        real = self.streams.real
        moments = Moments(self.table.shape[1], real is not None, self.device)
        for place, number in enumerate(self.numbers):
            if self.held_out(number):
                continue
            seen = self._seen(self.streams.quant[place]).values()
            moments.add(seen, None if real is None else self.inputs(real[place]))
        moments.reduce(self.ranks)
        return moments

    def measured(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of the head's inputs, [n, hidden], the same of the float model where its stream is
        kept, else once more, and the tokens that come next, [n], of the windows that are held out.
        """
        real = self.streams.quant if self.streams.real is None else self.streams.real
        few = self.windows < _HELD_OUT
        positions = max(1, _LOGITS // len(self.table))
        for place, number in enumerate(self.numbers):
            if not (few or self.held_out(number)):
                continue
            x, wanted = (self.inputs(one[place])[:-1] for one in (self.streams.quant, real))
            yield from zip(
                x.split(positions),
                wanted.split(positions),
                self.tokens[place, 1:].to(x.device).split(positions),
                strict=True,
            )

    def _seen(self, window: Tensor) -> Activation:
        return Activation.of(self.inputs(window), self.scheme.abits, self.scheme.act_symmetric)


@runtime_checkable
class HeadMethod(Protocol):
    """What a BlockMethod is too where it can quantise the head, given switches of the walk."""

    def head(self, task: HeadTask) -> QuantArrays:
        """Codes of the table."""


class _QuantizedHead:
    """The head with its codes."""

    def __init__(self, task: HeadTask, arrays: QuantArrays) -> None:
        scheme, count = task.scheme, len(arrays.codes)
        quantizer = None
        if scheme.abits < FLOAT_BITS:
            quantizer = ActivationQuantizer(scheme.abits, scheme.act_symmetric)
        self._parts = [
            FakeQuantLinear(
                QuantLinear(task.head.name, scheme, arrays.rows(slice(start, start + _ROWS))),
                quantizer,
                exact=False,
            ).to(task.device)
            for start in range(0, count, _ROWS)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab]."""
        return torch.cat([part(x) for part in self._parts], -1)


@torch.no_grad()  # type: ignore[untyped-decorator]
def quantise_head(method: HeadMethod, task: HeadTask) -> BlockResult:
    """The head's codes, none where it would cost more than the limit, and a report.

    The limit is for exp(D) - 1, the rise of perplexity on text as the float model expects it: D is
    the mean over tokens of KL(float model || quantized) - KL(float model || float), of the next
    token's distributions with either head behind the same quantized blocks. Where the method does
    not keep the float model's stream, the float head behind the quantized blocks is the float model,
    and D is the KL divergence from one head to the other: that counts as loss what a head makes up
    for the blocks. On the tokens of the text itself the difference of the losses has the same mean
    where the float model is right, but scatters by more than the limit.

    Returns:
        The codes, and a report: "bits"; "divergence", D in nats, and the relative "rise" of
        perplexity that it stands for; the mean losses of the text's next token, "loss_float" and
        "loss_quantized" in nats, and the standard error of their difference, "loss_error", tokens
        taken as independent; the "tokens" it was measured on, and whether the codes were "kept". A
        number is None where an activation is none.
    """
    arrays = method.head(task)
    linear, cap = _QuantizedHead(task, arrays), task.head.softcap
    # of the losses, the squares of their difference, the divergences, and the tokens
    sums = torch.zeros(5, dtype=torch.float64, device=task.device)
    for x, real, token in task.measured():
        before, after, expected = (
            (scores if cap is None else PLAIN.softcap(scores, cap)).log_softmax(-1)
            for scores in (F.linear(x, task.table), linear(x), F.linear(real, task.table))
        )
        losses = [-found.gather(-1, token[:, None]).double() for found in (before, after)]
        divergence = (expected.exp() * (before - after)).sum(-1)
        sums += torch.stack(
            [
                *(loss.sum() for loss in losses),
                (losses[1] - losses[0]).square().sum(),
                divergence.double().sum(),
                torch.tensor(float(len(x)), dtype=torch.float64, device=task.device),
            ]
        )
    task.ranks.sum([sums])
    tokens = int(sums[4])
    loss_float, loss_quantized, squares, divergence = (float(part / tokens) for part in sums[:4])
    variance = squares - (loss_quantized - loss_float) ** 2
    rise = math.expm1(min(divergence, _LARGEST_EXPONENT))
    kept = task.limit is None or rise <= task.limit  # NaN is above every limit
    report: dict[str, Any] = {
        "bits": task.scheme.label,
        "divergence": _finite(divergence),
        "rise": _finite(rise),
        "loss_float": _finite(loss_float),
        "loss_quantized": _finite(loss_quantized),
        "loss_error": _finite(
            math.nan if math.isnan(variance) else (max(variance, 0) / tokens) ** 0.5
        ),
        "tokens": tokens,
        "kept": kept,
    }
    return BlockResult({task.head.name: arrays} if kept else {}, {}, report)


def _finite(value: float) -> float | None:
    """With as many digits as do not change with the number of processes."""
    return round(value, 6) if math.isfinite(value) else None
