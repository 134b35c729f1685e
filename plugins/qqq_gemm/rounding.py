"""QQQGemm's rounding to nearest, and how far it can move a weight."""

from __future__ import annotations

import numpy as np

from plugins.core.op_spec import GemmScheme, QuantArrays
from plugins.core.rounding import SMALLEST_SCALE, grouped
from plugins.qqq_gemm.layout import INT8_MAX

__all__ = ["round_plain", "rounding_bound"]

_LARGEST = 7  # codes -7..7: symmetric, so +absmax is not clipped
_FP16_ROUNDOFF = 2.0**-11  # of the group scales


def round_plain(weight: np.ndarray, scheme: GemmScheme) -> QuantArrays:
    """Codes of fp32 [n, K], every group by itself; then one scale per channel over all groups."""
    groups, smallest = grouped(weight, scheme.group_size), np.float32(SMALLEST_SCALE)
    scale = np.maximum(np.abs(groups).max(-1) / np.float32(_LARGEST), smallest)  # [n, G]
    codes = np.clip(np.rint(groups / scale[..., None]), -_LARGEST, _LARGEST)
    flat = codes.astype(np.int8).reshape(weight.shape)
    if not scheme.group_size:
        return QuantArrays(flat, scale)
    # Second level: int8 weights w8 = rint(code * scale_group), w = scale_channel * w8.
    largest = np.abs(codes * scale[..., None]).max((-1, -2))[:, None]
    channel = np.maximum(largest / np.float32(INT8_MAX), smallest)
    return QuantArrays(flat, channel, scale_group=(scale / channel).astype(np.float16))


def rounding_bound(weight: np.ndarray, scheme: GemmScheme) -> np.ndarray:
    """Half a step of absmax / 7, and never further than to 0, which is on the grid; per group also
    half an int8 step of the row and the rounding of the group's scale.
    """
    size = np.abs(grouped(weight, scheme.group_size))
    absmax = size.max(-1, keepdims=True)
    bound = np.minimum(absmax / (2 * _LARGEST), size)
    if scheme.group_size:
        bound += absmax.max(1, keepdims=True) / INT8_MAX / 2 + size * _FP16_ROUNDOFF
    return np.asarray(bound + SMALLEST_SCALE, np.float32).reshape(weight.shape)
