"""Error of one tensor against its reference, per token, in fp64, added up over calls."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from exporter.graph.names import is_routed

__all__ = ["CompareTensors", "TensorError", "tensor_error"]

EXACT_DB = 200.0  # reported for equal tensors instead of infinity
_QUIET = 0.1  # of the mean channel; a channel quieter than this is judged as if it were this loud
_ROWS = 64  # tokens held in fp64 at once
_TINY = 1e-300


@dataclass(frozen=True)
class TensorError:
    """Sums over tokens; every token counts the same, so that one loud token cannot hide the others.

    Attributes:
        tokens: rows compared.
        squared_ratio: sum of |error|^2 / |reference|^2.
        cosines: sum of cosines.
        max_abs: largest difference.
        agreements: rows whose largest element is at the same place.
        channel_error, channel_signal: sums of squares per channel, [C].
        finite: neither side holds NaN or Inf.
        peak: largest magnitude of the reference; infinite where it holds NaN or Inf.
    """

    tokens: int
    squared_ratio: float
    cosines: float
    max_abs: float
    agreements: int
    channel_error: np.ndarray
    channel_signal: np.ndarray
    finite: bool
    peak: float

    # Polygraphy's Comparator prints quantiles of both tensors under this name, which takes longer
    # than the comparison; none has it.
    output1_name: ClassVar[str] = ""

    def __bool__(self) -> bool:
        return self.finite

    def __add__(self, other: TensorError) -> TensorError:
        return TensorError(
            self.tokens + other.tokens,
            self.squared_ratio + other.squared_ratio,
            self.cosines + other.cosines,
            max(self.max_abs, other.max_abs),
            self.agreements + other.agreements,
            self.channel_error + other.channel_error,
            self.channel_signal + other.channel_signal,
            self.finite and other.finite,
            max(self.peak, other.peak),
        )

    @property
    def relative(self) -> float:
        """Root of the mean over tokens of |error|^2 / |reference|^2; infinite if anything is NaN or
        Inf.
        """
        return math.sqrt(self.squared_ratio / self.tokens) if self.finite else math.inf

    @property
    def cosine(self) -> float:
        """Mean over tokens of the cosine, in [-1, 1]."""
        return self.cosines / self.tokens if self.finite else math.nan

    @property
    def snr_db(self) -> float:
        """Signal to noise ratio, -20 log10 of the relative error; EXACT_DB for equal tensors."""
        if not self.finite:
            return -math.inf
        return min(-20 * math.log10(self.relative), EXACT_DB) if self.relative > 0 else EXACT_DB

    @property
    def agreement(self) -> float:
        """Share of tokens with the same largest element."""
        return self.agreements / self.tokens

    @property
    def worst_channel(self) -> tuple[int, float]:
        """The channel with the largest relative error over all tokens, and that error."""
        if not self.finite:
            return 0, math.inf
        floor = _QUIET**2 * float(self.channel_signal.mean()) + _TINY
        ratios = self.channel_error / np.maximum(self.channel_signal, floor)
        worst = int(ratios.argmax())
        return worst, math.sqrt(float(ratios[worst]))


def tensor_error(reference: np.ndarray, got: np.ndarray, valid: np.ndarray) -> TensorError:
    """Compare two tensors [B, S, C] at the tokens where `valid` [B, S] is true.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != got.shape or reference.shape[:2] != valid.shape:
        raise ValueError(f"shapes differ: {reference.shape}, {got.shape}, {valid.shape}")
    rows = np.flatnonzero(valid.reshape(-1))
    pair = [array.reshape(-1, array.shape[-1]) for array in (reference, got)]
    parts = [
        _rows_error(*(array[rows[start : start + _ROWS]].astype(np.float64) for array in pair))
        for start in range(0, len(rows), _ROWS)
    ]
    return reduce(TensorError.__add__, parts)


def _rows_error(reference: np.ndarray, got: np.ndarray) -> TensorError:
    tokens, channels = reference.shape
    error = got - reference
    peak = float(max(reference.max(), -reference.min()))
    peak = peak if math.isfinite(peak) else math.inf
    signal, noise, loudness = (
        np.einsum("tc,tc->t", array, array) for array in (reference, error, got)
    )
    if not np.isfinite(signal + noise + loudness).all():
        nothing = np.zeros(channels)
        return TensorError(tokens, math.inf, math.nan, math.inf, 0, nothing, nothing, False, peak)
    dot = (signal + loudness - noise) / 2
    product = np.sqrt(signal) * np.sqrt(loudness)
    # Two silent rows agree; a silent row against a loud one does not.
    cosine = np.where(
        product > 0,
        np.clip(dot / np.maximum(product, _TINY), -1, 1),
        (signal == loudness).astype(float),
    )
    ratio = np.where(noise > 0, noise / np.maximum(signal, _TINY), 0.0)
    same = int((reference.argmax(1) == got.argmax(1)).sum())
    return TensorError(
        tokens,
        float(ratio.sum()),
        float(cosine.sum()),
        float(max(error.max(), -error.min())),
        same,
        np.einsum("tc,tc->c", error, error),
        np.einsum("tc,tc->c", reference, reference),
        True,
        peak,
    )


def _other_rows(reference: np.ndarray) -> TensorError:
    """Of a tensor whose rows are those of other tokens, so that there is nothing to compare."""
    nothing = np.zeros(reference.shape[-1])
    return TensorError(1, math.inf, math.nan, math.inf, 0, nothing, nothing, False, 0.0)


class CompareTensors:
    """A Polygraphy compare function: TensorError of each tensor that both results hold.

    Args:
        valid: [B, S], false at padding, which nobody reads.
    """

    def __init__(self, valid: np.ndarray) -> None:
        self._valid = valid

    def __call__(
        self, reference: Mapping[str, Any], got: Mapping[str, Any]
    ) -> OrderedDict[str, TensorError]:
        """Compare two iteration results; the first is the reference. An expert that no token reached
        in either says nothing; one that has other rows in the two differs wholly.
        """
        names = [
            name for name in reference if name in got and (got[name].size or reference[name].size)
        ]
        return OrderedDict(
            (
                name,
                _other_rows(reference[name])
                if is_routed(name) and reference[name].shape != got[name].shape
                else tensor_error(
                    self._rows(reference[name]), self._rows(got[name]), self._valid_of(name, got)
                ),
            )
            for name in names
        )

    def _valid_of(self, name: str, got: Mapping[str, Any]) -> np.ndarray:
        """An expert's rows all count: whatever a token is, it has to be computed alike."""
        return np.ones(got[name].shape[:2], bool) if is_routed(name) else self._valid

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """[B, S, C]; of a cache tensor [B, heads, P+S, width] the new tokens."""
        if array.ndim != 4:
            return array
        new = array[:, :, -self._valid.shape[1] :].transpose(0, 2, 1, 3)
        return new.reshape(*new.shape[:2], -1)
