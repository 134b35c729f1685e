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
_POSITIONS = 256  # whose logits are in memory together
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

    def measured(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the head's inputs, [n, hidden], with the tokens that come next, [n], of the
        windows that are held out.
        """
        few = self.windows < _HELD_OUT
        for place, number in enumerate(self.numbers):
            if not (few or self.held_out(number)):
                continue
            x = self.inputs(self.streams.quant[place])[:-1]
            yield from zip(
                x.split(_POSITIONS),
                self.tokens[place, 1:].to(x.device).split(_POSITIONS),
                strict=True,
            )

    def _seen(self, window: Tensor) -> Activation:
        return Activation.of(self.inputs(window), self.scheme.abits, self.scheme.act_symmetric)


@runtime_checkable
class HeadMethod(Protocol):
    """What a BlockMethod is too where it can quantise the head, given switches of the walk."""

    def head(self, task: HeadTask) -> QuantArrays:
        """Codes of the table."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def quantise_head(method: HeadMethod, task: HeadTask) -> BlockResult:
    """The head's codes, none where it would cost more than the limit, and a report: "bits", the
    mean loss of the next token in nats with the float and with the quantised head behind the same
    quantised blocks, the relative "rise" of perplexity from one to the other (None where an
    activation is no number), the "tokens" it was measured on, and whether the codes were "kept".
    """
    arrays, scheme = method.head(task), task.scheme
    quantizer = None
    if scheme.abits < FLOAT_BITS:
        quantizer = ActivationQuantizer(scheme.abits, scheme.act_symmetric)
    linear = FakeQuantLinear(QuantLinear(task.head.name, scheme, arrays), quantizer, exact=False)
    linear.to(task.device)
    sums = torch.zeros(3, dtype=torch.float64, device=task.device)
    for x, wanted in task.measured():
        for index, scores in enumerate((F.linear(x, task.table), linear(x))):
            cap = task.head.softcap
            logits = scores if cap is None else PLAIN.softcap(scores, cap)
            sums[index] += F.cross_entropy(logits, wanted, reduction="sum").double()
        sums[2] += len(x)
    task.ranks.sum([sums])
    before, after = (float(part / sums[2]) for part in sums[:2])
    rise = math.expm1(min(after - before, _LARGEST_EXPONENT))
    kept = task.limit is None or rise <= task.limit  # NaN is above every limit
    report: dict[str, Any] = {
        "bits": scheme.label,
        "loss_float": _finite(before),
        "loss_quantized": _finite(after),
        "rise": _finite(rise),
        "tokens": int(sums[2]),
        "kept": kept,
    }
    return BlockResult({task.head.name: arrays} if kept else {}, {}, report)


def _finite(value: float) -> float | None:
    """With as many digits as do not change with the number of processes."""
    return round(value, 6) if math.isfinite(value) else None
