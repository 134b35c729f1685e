"""ABQGemm's rounding to nearest, and how far it can move a weight."""

from __future__ import annotations

import numpy as np

from plugins.core.op_spec import GemmScheme, QuantArrays
from plugins.core.rounding import SMALLEST_SCALE, grouped

__all__ = ["FLAT", "round_plain", "rounding_bound"]

# A group with a narrower range than this part of its absmax keeps a zero point of 16 bits.
FLAT = 2.0**-15
_LARGEST = np.finfo(np.float32).max
_FEW_LEVELS = 3  # up to here all levels but 0 have one magnitude,
# the best of {0, s} or {-s, 0, s} for Gaussian weights, in units of mean |w| (Lloyd-Max)
_MAGNITUDE = 1.5


def round_plain(weight: np.ndarray, scheme: GemmScheme) -> QuantArrays:
    """Codes of fp32 [n, K], every group by itself."""
    groups = grouped(weight, scheme.group_size)
    if scheme.has_minimum:
        low, scale = groups.min(-1), _range(groups, scheme.levels)
        codes = np.rint(groups / scale[..., None] - (low / scale)[..., None])
        codes = np.clip(codes, 0, scheme.levels - 1).astype(np.uint8).reshape(weight.shape)
        return QuantArrays(codes, scale, minimum=low)
    find = _few_levels if scheme.levels <= _FEW_LEVELS else _min_max
    scale, zero = find(groups, scheme.levels)
    codes = np.rint(groups / scale[..., None]) + zero[..., None]
    codes = np.clip(codes, 0, scheme.levels - 1).astype(np.uint8).reshape(weight.shape)
    return QuantArrays(codes, scale, zero.astype(np.int32))


def _min_max(groups: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, both [n, G] fp32, that put the smallest weight on code 0 and the
    largest on the last.
    """
    scale = _range(groups, levels)
    return scale, np.rint(-groups.min(-1) / scale)


def _range(groups: np.ndarray, levels: int) -> np.ndarray:
    """The scale [n, G] fp32 with which the codes reach from the smallest weight to the largest."""
    low, high = groups.min(-1), groups.max(-1)
    absmax = np.maximum(np.abs(low), np.abs(high))
    width = high / (levels - 1) - low / (levels - 1)  # divided first: high - low may overflow
    scale = np.maximum(np.maximum(width, absmax * np.float32(FLAT)), np.float32(SMALLEST_SCALE))
    return np.asarray(scale)


def _few_levels(groups: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """W1: {0, s} or {-s, 0}, the side with more energy; W1*: {-s, 0, s}.

    Zero points are integers, so two levels cannot lie at +-s, and min/max would round nearly all
    weights to 0.
    """
    level = np.abs(groups).mean(-1, dtype=np.float64) * _MAGNITUDE
    scale = np.clip(level, SMALLEST_SCALE, _LARGEST).astype(np.float32)
    energy = np.square(groups, dtype=np.float64) * np.sign(groups)
    zero = np.ones_like(scale) if levels == _FEW_LEVELS else (energy.sum(-1) < 0).astype(np.float32)
    return scale, zero


def rounding_bound(weight: np.ndarray, scheme: GemmScheme) -> np.ndarray:
    """Half a step of the group's range, and never further than to 0, which is on the grid; W1 and
    W1* have a magnitude instead of a step. With a minimum, 0 is on no grid, and the sum of product and
    minimum is rounded.
    """
    groups = grouped(weight, scheme.group_size)
    if scheme.has_minimum:
        rounding = np.abs(groups).max(-1, keepdims=True) * np.float32(2.0**-22)
        bound = (_range(groups, scheme.levels)[..., None] / 2 + rounding) * np.ones_like(groups)
    elif scheme.levels <= _FEW_LEVELS:
        bound = _one_magnitude(groups, scheme.levels)
    else:
        size, steps = np.abs(groups), scheme.levels - 1
        width = groups.max(-1, keepdims=True) / steps - groups.min(-1, keepdims=True) / steps
        flat = size.max(-1, keepdims=True) * FLAT
        bound = np.minimum(np.maximum(width, flat) / 2, size)
    return np.asarray(bound + SMALLEST_SCALE, np.float32).reshape(weight.shape)


def _one_magnitude(groups: np.ndarray, levels: int) -> np.ndarray:
    """{-s, 0, s}, or with two levels {0, s} on the side that holds more energy."""
    size = np.abs(groups)
    near = np.minimum(
        size, np.abs(size - _MAGNITUDE * size.mean(-1, keepdims=True, dtype=np.float64))
    )
    if levels == _FEW_LEVELS:
        return np.asarray(near)
    side = np.sign((np.square(groups, dtype=np.float64) * np.sign(groups)).sum(-1, keepdims=True))
    return np.asarray(np.where(np.sign(groups) == np.where(side == 0, 1, side), near, size))
