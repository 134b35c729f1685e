"""What a proof takes of the memory, and how it is done where that is less than all at once would take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from calibration.quant.scheme import FLOAT_BITS
from calibration.quant.sizes import node_weights
from exporter.graph.names import layer_of
from plugins import op_spec
from plugins.cores import usable_memory
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.families import Decoder
    from calibration.quant.scheme import QuantScheme

__all__ = ["BEYOND", "Calls", "Fit", "Need", "attention_windows", "check_memory", "memory_needed"]

_BASE = 500_000_000  # Python with torch, transformers and ONNX Runtime
_RECORDS = 4  # of all calls: two that are compared, and two of later comparisons
_FLOAT = 4  # bytes per number of what runners give, and of models in floating point
_CODE = 1  # bytes per weight of the reference that multiplies integers


# Tokens of a prefill whose length nobody gave, and at most; how many cross a window.
_PREFILL, _LONGEST, BEYOND = 64, 1024, 8
_PADDED = 16  # tokens of a row of the padded batch


@dataclass(frozen=True)
class Calls:
    """How long the calls of a proof are, in tokens.

    Attributes:
        prefill: of the first.
        steps: behind it, of one each.
        padded: of a row of a batch of two, with a step on that.
    """

    prefill: int
    steps: int
    padded: int

    @classmethod
    def within(
        cls, room: int, windows: Sequence[int] = (), prefill: int | None = None, steps: int = 8
    ) -> Calls:
        """Those of sequences of at most `room` tokens.

        Args:
            windows: of attentions, smallest first. A prefill that nobody gave leaves the first one, if
                that can be afforded.
        """
        steps = max(min(steps, room - 2), 0)
        if prefill is None:
            longest = max([_PREFILL, *(span + BEYOND for span in windows[:1])])
            prefill = longest if longest <= _LONGEST else _PREFILL
        prefill = min(prefill, room - steps)
        return cls(prefill, steps, min(prefill, _PADDED, room - 1))

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.prefill + self.steps + 2 * (self.padded + 1)


def attention_windows(decoder: Decoder, context: int) -> list[int]:
    """The windows of the attentions that do not see every token of the context, smallest first."""
    spans = {block.attend.window for block in decoder.blocks}
    return sorted(span for span in spans if span is not None and span < context)


class Fit(NamedTuple):
    """How a proof goes about the memory that there is.

    Attributes:
        folded: whether the function bodies have to be unpacked layer by layer.
        floats: whether the float model fits.
        needed: bytes at the peak.
    """

    folded: bool
    floats: bool
    needed: int


@dataclass(frozen=True)
class Need:
    """Bytes that a proof holds at its peak; one model is in memory at a time.

    Attributes:
        whole: with the function bodies of the whole graph unpacked.
        folded: with those of one decoder layer, or of the head, at a time.
        floats: with the float model.
    """

    whole: int
    folded: int
    floats: int


def memory_needed(decoder: Decoder, schemes: Mapping[str, QuantScheme], tokens: int) -> Need:
    """Of a model, by how each of its GEMM nodes is quantized, and the tokens of all calls."""
    shapes, head = decoder.shapes(), decoder.head
    unpacked: Counter[int | None] = Counter()  # by decoder layer, and of the head
    weights, codes = 0, 0
    for node, scheme in schemes.items():
        count = node_weights(decoder.sites[node].linears)
        unpacked[layer_of(node)] += op_spec(scheme.op).unpacked_bytes(scheme.gemm) * count
        codes += (_CODE if scheme.abits < FLOAT_BITS else _FLOAT) * count
        weights += count
    parameters = sum(math.prod(shape) for shape in shapes.values())
    rest = parameters - weights
    if head.quantized and head.tied:
        rest += math.prod(shapes[f"{decoder.embedding.name}.weight"])
    reference = codes + _FLOAT * rest
    base = _BASE + _RECORDS * tokens * _recorded(decoder, schemes)
    return Need(
        whole=base + max(unpacked.total(), reference),
        folded=base + max(*unpacked.values(), reference),
        floats=base + _FLOAT * parameters,
    )


def _recorded(decoder: Decoder, nodes: Iterable[str]) -> int:
    """Bytes of a token in what a runner gives: in front of every node and behind it, behind
    every layer, and logits.
    """
    chosen = next((one for _, one in decoder.routers.values()), None)
    numbers = decoder.layers * decoder.hidden + decoder.vocab
    for node in nodes:
        linears, part = decoder.sites[node].linears, Fraction(1)
        if chosen is not None and node in decoder.routed:
            part = Fraction(chosen.top, len(chosen.members))
        numbers += int(part * (linears.in_features + linears.out_features))
    return _FLOAT * numbers


def check_memory(decoder: Decoder, schemes: Mapping[str, QuantScheme], tokens: int) -> Fit:
    """Compare what the proof needs, by the tokens of all its calls, with the memory that may be used,
    before hours of other work.

    Returns:
        How it fits. Where the system does not tell of its memory (it is not Linux) all does.

    Raises:
        InputError: not even one layer after the other fits.
    """
    free, need = usable_memory(), memory_needed(decoder, schemes, tokens)
    if free is None:
        return Fit(False, True, max(need.whole, need.floats))
    if need.folded > free:
        weights = sum(node_weights(decoder.sites[node].linears) for node in schemes)
        raise InputError(
            "validation",
            f"got {free / 1e9:.2f} GB of free memory, expected {need.folded / 1e9:.2f} GB for "
            f"{weights / 1e6:.0f} M weights",
            "Use --until engine here, and validate on a machine with more memory",
        )
    folded, floats = need.whole > free, need.floats <= free
    needed = max(need.folded if folded else need.whole, need.floats if floats else 0)
    return Fit(folded, floats, needed)
