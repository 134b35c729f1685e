"""Round to nearest: the plain method. No data, no search; every row (or group of a row) by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from plugins.core.op_spec import QuantArrays

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["quantize"]

TINY = np.float32(2.0**-126)  # smallest scale: its reciprocal is finite and no GPU flushes it
_LARGEST = np.finfo(np.float32).max
_FLAT = np.float32(
    2.0**-15
)  # a row with a narrower range than this part of its absmax keeps a zero point of 16 bits
_ONE_BIT_LEVEL = (
    1.5  # best level of {0, s} or {-s, 0, s} for Gaussian weights, in units of mean |w| (Lloyd-Max)
)
_QQQ_MAX = 7  # codes -7..7: symmetric, so +absmax is not clipped
_INT8_MAX = 127
_CHUNK = 1 << 22  # weights converted to fp32 together


def quantize(weight: np.ndarray, bias: np.ndarray | None, scheme: QuantScheme) -> QuantArrays:
    """Codes of one linear, by chunks of rows so that fp32 copies stay small.

    Args:
        weight: [N, K], any float type, finite.
        bias: [N] or None.
        scheme: op, bits and group size.
    """
    rows = max(1, _CHUNK // weight.shape[1])
    one = _qqq_rows if scheme.op == "QQQGemm" else _abq_rows
    parts = [
        one(np.asarray(weight[start : start + rows], np.float32), scheme)
        for start in range(0, len(weight), rows)
    ]

    def stacked(field: str) -> np.ndarray | None:
        values = [getattr(part, field) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    return QuantArrays(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        stacked("zero"),
        stacked("scale_group"),
        None if bias is None else np.asarray(bias, np.float32),
    )


def _grouped(weight: np.ndarray, group_size: int) -> np.ndarray:
    return weight.reshape(len(weight), -1, group_size or weight.shape[1])  # [N, G, group_len]


def _abq_rows(weight: np.ndarray, scheme: QuantScheme) -> QuantArrays:
    groups = _grouped(weight, scheme.group_size)
    scale, zero = (_few_levels if scheme.levels <= 3 else _min_max)(groups, scheme.levels)
    codes = np.rint(groups / scale[..., None]) + zero[..., None]
    codes = np.clip(codes, 0, scheme.levels - 1).astype(np.uint8).reshape(weight.shape)
    return QuantArrays(codes, scale, zero.astype(np.int32))


def _min_max(groups: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, both [N, G] fp32, that put the smallest weight on code 0 and the
    largest on the last.
    """
    low, high = groups.min(-1), groups.max(-1)
    absmax = np.maximum(np.abs(low), np.abs(high))
    width = high / (levels - 1) - low / (levels - 1)  # divided first: high - low may overflow
    scale = np.maximum(np.maximum(width, absmax * _FLAT), TINY)
    return scale, np.rint(-low / scale)


def _few_levels(groups: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """W1: {0, s} or {-s, 0}, the side with more energy; W1*: {-s, 0, s}.

    Zero points are integers, so two levels cannot lie at +-s, and min/max would round nearly all
    weights to 0.
    """
    level = np.abs(groups).mean(-1, dtype=np.float64) * _ONE_BIT_LEVEL
    scale = np.clip(level, TINY, _LARGEST).astype(np.float32)
    energy = np.square(groups, dtype=np.float64) * np.sign(groups)
    zero = np.ones_like(scale) if levels == 3 else (energy.sum(-1) < 0).astype(np.float32)
    return scale, zero


def _qqq_rows(weight: np.ndarray, scheme: QuantScheme) -> QuantArrays:
    groups = _grouped(weight, scheme.group_size)
    scale = np.maximum(np.abs(groups).max(-1) / np.float32(_QQQ_MAX), TINY)  # [N, G]
    codes = np.clip(np.rint(groups / scale[..., None]), -_QQQ_MAX, _QQQ_MAX)
    flat = codes.astype(np.int8).reshape(weight.shape)
    if not scheme.group_size:
        return QuantArrays(flat, scale)
    # Second level: int8 weights w8 = rint(code * scale_group), w = scale_channel * w8.
    largest = np.abs(codes * scale[..., None]).max((-1, -2))[:, None]
    channel = np.maximum(largest / np.float32(_INT8_MAX), TINY)
    return QuantArrays(flat, channel, None, (scale / channel).astype(np.float16))
