"""Holds every tensor in quant/ against the float model's, one at a time: a broken code or scale
that both sides of "export" read.

The op says how far rounding to nearest moves a weight at most (OpSpec.rounding_bound): about half a
step, which follows from the number of levels and the float weights' own range in their group, never
from the scales in quant/, so a wrong scale shows as well as a wrong code. An honest error is about
0.6 of that limit. Tensors that are not quantised may differ by their rounding to the model's type.

Codes that were kept from a checkpoint stand for its very weights: nothing may differ.

Other methods than "rtn" may transform the weights (scale channels, rotate, correct errors), so that
single weights need not be close to the float model's. Their errors are shown without a limit; only
NaN, Inf and missing tensors fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from calibration.methods import PLAIN_METHOD
from calibration.progress import NullProgress, Progress
from calibration.quant.scheme import QuantLinear, QuantScheme
from exporter.graph.names import layer_of
from exporter.proof.judge import WEIGHTS, LayerReport
from exporter.proof.limits import unit_roundoff
from exporter.proof.metrics import EXACT_DB
from plugins import op_spec

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel

__all__ = ["compare_weights", "compared_tensors"]

_CHUNK = 1 << 22  # weights held as fp32 at once
_MARGIN = 1.01  # fp32 rounding of weights that lie between two codes
_SMALLEST_HALF = 2.0**-24  # spacing of fp16 subnormals
_SAME = 2.0**-24  # of a weight: what is not the same in fp32 differs by more
_SMALLEST = 2.0**-126  # normal number of fp32


@dataclass
class _Sums:
    """Of one tensor, over chunks of its rows."""

    error: float = 0.0  # sums of squares
    bound: float = 0.0
    signal: float = 0.0
    loudness: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    worst: tuple[int, float, float] = (0, 0.0, 0.0)  # row, its relative error, its limit
    rows: int = 0

    def add(self, weight: np.ndarray, got: np.ndarray, bound: np.ndarray) -> None:
        """Rows [n, K] of the float tensor, of what quant/ holds, and of the largest honest error."""
        difference = got - weight
        error, limit, signal, loudness = (
            np.einsum("nk,nk->n", array, array, dtype=np.float64)
            for array in (difference, bound, weight, got)
        )
        error = np.where(np.isfinite(error), error, np.inf)
        self.error, self.bound, self.signal = (
            self.error + error.sum(),
            self.bound + limit.sum(),
            self.signal + signal.sum(),
        )
        self.loudness += loudness.sum()
        self.dot += float(np.einsum("nk,nk->", weight, got, dtype=np.float64))
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        row = int((error / limit).argmax())
        found = _relative(error[row], signal[row]), _MARGIN * _relative(limit[row], signal[row])
        if not self.rows or found[0] / found[1] > self.worst[1] / self.worst[2]:
            self.worst = (self.rows + row, *found)
        self.rows += len(weight)

    def report(self, name: str, plain: bool) -> LayerReport:
        """The row of the table; without limits if the method is not plain."""
        if not math.isfinite(self.error):
            return LayerReport(WEIGHTS, "", name, None, None, None, None, None)
        relative = _relative(self.error, self.signal)
        cosine = (
            self.dot / math.sqrt(self.signal * self.loudness)
            if self.signal * self.loudness > 0
            else float(self.error == 0)
        )
        snr = min(-20 * math.log10(relative), EXACT_DB) if relative > 0 else EXACT_DB
        row, error, limit = self.worst
        report = LayerReport(
            WEIGHTS,
            "",
            name,
            min(cosine, 1.0),
            snr,
            self.max_abs,
            relative,
            _MARGIN * _relative(self.bound, self.signal),
            None,
            f"row {row}",
            error,
            limit,
        )
        return report if plain else replace(report, limit=None, operator_limit=None)


def _relative(error: float, signal: float) -> float:
    return math.sqrt(error / max(signal, 1e-300))


def _missing(name: str) -> LayerReport:
    return LayerReport(WEIGHTS, "", name, None, None, None, None, None)


def _pieces(linear: QuantLinear) -> Iterator[tuple[slice, QuantLinear]]:
    """A linear by chunks of its rows."""
    rows, width = linear.arrays.codes.shape
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        yield part, QuantLinear(linear.name, linear.scheme, linear.arrays.rows(part))


def _linear_sums(weight: np.ndarray, linear: QuantLinear, order: np.ndarray | None) -> _Sums:
    sums, op = _Sums(), op_spec(linear.scheme.op)
    for part, piece in _pieces(linear):
        rows = np.asarray(weight[part], np.float32)
        if order is not None:
            rows = rows[:, order]
        bound = (
            np.abs(rows) * np.float32(_SAME) + np.float32(_SMALLEST)
            if linear.scheme.kept
            else op.rounding_bound(rows, linear.scheme.gemm)
        )
        sums.add(rows, piece.dequantize(), bound)
    return sums


def _float_sums(weight: np.ndarray, got: np.ndarray, scheme: QuantScheme) -> _Sums:
    """A tensor that is not quantised; every element of a vector is a row of its own."""
    weight, got = (array.reshape(len(array), -1) for array in (weight, got))
    sums, step = _Sums(), max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows, others = (
            np.asarray(array[start : start + step], np.float32) for array in (weight, got)
        )
        sums.add(
            rows,
            others,
            np.abs(rows) * np.float32(unit_roundoff(scheme.dtype)) + np.float32(_SMALLEST_HALF),
        )
    return sums


def _shapes(
    checkpoint: Checkpoint, quant: QuantModel, layers: range | None
) -> dict[str, Sequence[int]]:
    """Of the tensors to compare: all, or those in no layer and in these; with the codes of a quantized
    head beside a table that it was tied to.
    """
    decoder = checkpoint.decoder
    if quant.decoder.head.quantized:
        decoder = decoder.with_quantized_head()
    return {
        name: shape
        for name, shape in decoder.shapes().items()
        if layers is None or (layer := layer_of(name)) is None or layer in layers
    }


def compared_tensors(checkpoint: Checkpoint, quant: QuantModel, layers: range | None = None) -> int:
    """How many rows compare_weights gives, and how far it moves the progress."""
    return len(_shapes(checkpoint, quant, layers)) + len(quant.decoder.frequencies)


def compare_weights(
    checkpoint: Checkpoint,
    quant: QuantModel,
    progress: Progress | None = None,
    layers: range | None = None,
) -> list[LayerReport]:
    """One row per tensor of the float model, in its order; relative errors are Frobenius norms, of
    the whole and of the worst row.

    Args:
        layers: leave the other decoder layers out; None takes all.

    Memory: one tensor of the float model and a few million weights in fp32.
    """
    progress, reports = progress or NullProgress(), []
    # A method that transforms some weights may do so by changing the norms before them.
    plain = all(scheme.kept or scheme.method == PLAIN_METHOD for scheme in quant.schemes)
    linears = quant.decoder.linears
    for name, shape in _shapes(checkpoint, quant, layers).items():
        base = name.removesuffix(".weight")
        quantised = name != base and base in linears
        stored = f"{base}.codes" if quantised else name
        if not quant.has(stored) or quant.tensor(stored).shape != tuple(shape):
            reports.append(_missing(base if quantised else name))
        else:
            head = checkpoint.decoder.head.name
            table = checkpoint.decoder.head_table() if base == head else base
            weight = checkpoint.array(name if table == base else f"{table}.weight")
            sums = (
                _linear_sums(weight, quant.linear(base), quant.order(base))
                if quantised
                else _float_sums(weight, quant.tensor(name), quant.scheme)
            )
            reports.append(sums.report(base if quantised else name, plain))
        progress.advance(note=name)
    for name in quant.decoder.frequencies:
        sums = _float_sums(checkpoint.rope(name)[0], quant.tensor(name), quant.scheme)
        reports.append(sums.report(name, plain))
        progress.advance(note=name)
    return reports
