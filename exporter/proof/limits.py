"""Largest errors an honest run may show, from the bit widths alone.

u is the unit roundoff of the model's type, 2^-11 for fp16: half the gap between neighbours,
relative.

Operator errors (the reference gets the very inputs the runner had): a GEMM computes the same
integers and scales them in the same order, so nothing but a last rounding that falls on the other
side may differ: 2 u of one element, hence at most 2 u of a channel, and almost always far less.
fp32 sums of A16 and of groups add their own small term. On SmolLM2-135M the honest runs showed 0
with quantised activations (W4A8, W8A8, W4A4, W2*A8 in fp16, W8A8 in bf16 and fp32) and up to 1.6 u
with A16. What must not pass is larger: an LSB plane dropped or inverted at W8 is 2 % of a channel,
a zero point off by one about as much, scales cut to bfloat16 up to 2^-7 (not seen if the outputs
are bfloat16 too), a dropped bias more. Norms, the MLP product and the logits are a few roundings in
a row; attention is a longer chain, and its softmax multiplies errors of the scores. A low-bit cache
is given the keys that go into it, and its arithmetic is exact to the bit, so that nothing may
differ.

Accumulated errors (each side runs on its own numbers): two runs that differ by u put an activation
on different sides of a code's edge with probability about u |x| / step, and are then one step
apart. With step = max|x| / qmax this is a relative error of sqrt(3 u / qmax) at each linear's input
for bell-shaped activations: 0.3 % at A8 and 1.5 % at A4 in fp16; SmolLM2-135M at A8 showed 0.33 %.
Independent errors of 4 linears per layer add up as a root of their number; outliers and the
residual stream's growth are covered by a factor. In fp32 flips are rare, but one is enough: it
moves its token by up to 20 / 127 / sqrt(K) (0.7 % at K = 576 and A8), and then codes flip further
on as often as in fp16, so fp16's u stands for fp32's there. The codes of a low-bit KV cache flip in
the same way, once per layer, since keys and values meet in one tensor, attention's output. A
decoder damps such differences while its weights and activations are near the trained ones; past a
quantisation noise of about 0.2 per linear (W3, A4, W2*) it amplifies them, layer by layer, by about
the excess. Of SmolLM2-135M (W4A8) the keys and values of a session that leaves roundings out showed up
to 0.7 of the limit, and none where every node has a native kernel. Where the limit reaches 1 nothing can be said, and only the operators judge.

Quantisation errors (float against fake-quantised) tell how good the codes are, not whether the
export is right: their expectation assumes bell-shaped weights (range 8 sigma) and activations
(range 20 sigma), and is meant to catch a broken layer only. Keys and values are quantised head by
head, where the range is 8 sigma too (SmolLM2-135M: 5.4 to 7.6). Tokens with larger outliers are
covered by a factor: SmolLM2-135M at W8A8 showed 2.2 times the expectation. The codes themselves are
judged one linear at a time, see weights.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibration.quant.scheme import FLOAT_BITS

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["Limits", "coarsest", "unit_roundoff"]

_UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_FP32_SUMS = 2.0**-16  # sums of some thousand fp32 terms in different orders, with cancellation
_GEMM, _POINTWISE, _ATTENTION = 2, 8, 16  # in u
_MARGIN, _QUANTISATION_MARGIN = 8.0, 4.0
_DAMPED = 0.2  # quantisation noise per linear up to which differences do not grow by themselves
_WEIGHT_RANGE, _ACTIVATION_RANGE, _CACHE_RANGE = 8.0, 20.0, 8.0  # in sigma


def unit_roundoff(dtype: str) -> float:
    """Half the gap between neighbours of a type, relative."""
    return _UNIT_ROUNDOFF[dtype]


def coarsest(schemes: Iterable[QuantScheme]) -> QuantScheme:
    """The fewest weight codes and the fewest activation bits of several: no linear of a model that
    mixes them is noisier.
    """
    found = tuple(schemes)
    return replace(
        min(found, key=lambda scheme: scheme.levels), abits=min(scheme.abits for scheme in found)
    )


@dataclass(frozen=True)
class Limits:
    """Limits on relative errors for one quantisation scheme."""

    scheme: QuantScheme

    @property
    def roundoff(self) -> float:
        """u of the model's type."""
        return unit_roundoff(self.scheme.dtype)

    def gemm(self) -> float:
        """Worst channel of a GEMM's output, given its input: one last bit that falls on the other
        side.
        """
        return _GEMM * self.roundoff + _FP32_SUMS

    def pointwise(self) -> float:
        """Norms, rotary embedding, MLP product, residual sum, logits; given their inputs."""
        return _POINTWISE * self.roundoff + _FP32_SUMS

    def attention(self) -> float:
        """Attention's output, given the projections."""
        return _ATTENTION * self.roundoff + _FP32_SUMS

    def cache(self) -> float:
        """What a low-bit KV cache gives back, given the new keys and values: the same codes and
        scales.
        """
        return _FP32_SUMS

    def unrounded(self, kind: str) -> float:
        """As operator(), of a session that may leave roundings to 16 bits out: what an operator reads
        then differs from the tensor that is seen by u, so that codes of it flip.
        """
        exact = self.operator(kind)
        if self.scheme.dtype != "float16":  # the only 16-bit type that such sessions have
            return exact
        bits = {"gemm": self.scheme.abits, "cache": self.scheme.kv_bits}.get(kind)
        if bits is None:
            return exact
        return max(exact, self.pointwise()) + _MARGIN * self._flips(bits)

    def operator(self, kind: str) -> float:
        """Of an operator of a kind, given its inputs: one of "gemm", "attention", "cache" and
        "pointwise".
        """
        kinds = {"gemm": self.gemm, "attention": self.attention, "cache": self.cache}
        return kinds.get(kind, self.pointwise)()

    def noise(self) -> float:
        """Relative quantisation noise of one linear, from both widths, and of the cache."""
        spans = [(_WEIGHT_RANGE, self.scheme.levels - 1)]
        spans += [
            (span, 2**bits - 1)
            for span, bits in (
                (_ACTIVATION_RANGE, self.scheme.abits),
                (_CACHE_RANGE, self.scheme.kv_bits),
            )
            if bits < FLOAT_BITS
        ]
        return math.hypot(*(span / steps / math.sqrt(12) for span, steps in spans))

    def _flips(self, bits: int) -> float:
        """Relative error from codes of these bits that fall on the other side."""
        steps = 2 ** (bits - 1) - 1
        return (
            0.0
            if bits == FLOAT_BITS
            else math.sqrt(3 * max(self.roundoff, _UNIT_ROUNDOFF["float16"]) / steps)
        )

    def accumulated(self, layers: int, nodes: int) -> float | None:
        """Residual stream, and what a node makes of it, after `layers` decoder layers with so many
        GEMM nodes in all, each side on its own; None where any error may be honest.
        """
        growth = (1 + max(self.noise() - _DAMPED, 0)) ** layers
        layer = math.hypot(
            math.sqrt(nodes / layers) * (self._flips(self.scheme.abits) + 2 * self.roundoff),
            self._flips(self.scheme.kv_bits),
        )
        limit = _MARGIN * growth * math.sqrt(layers) * layer + _FP32_SUMS
        return limit if limit < 1 else None

    def quantisation(self, nodes: int) -> float | None:
        """Fake-quantised against float after so many GEMM nodes; None where any error may be
        honest.
        """
        limit = _QUANTISATION_MARGIN * math.sqrt(nodes) * self.noise()
        return limit if limit < 1 else None
