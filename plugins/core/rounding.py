"""What every rounding of weights shares: the smallest scale, and groups of input channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SMALLEST_SCALE", "grouped"]

SMALLEST_SCALE = 2.0**-126  # its reciprocal is finite in fp32 and no GPU flushes it


def grouped(weight: np.ndarray, group_size: int) -> np.ndarray:
    """Weights [N, K] as [N, G, group_len]; a group size of 0 is the whole row."""
    return weight.reshape(len(weight), -1, group_size or weight.shape[1])
