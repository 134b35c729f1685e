"""Floats of 4 bits (e2m1) as integer codes: twice their values are whole numbers from -12 to 12, so
that scale * value is scale / 2 * (code - 12) to the bit.

The numbers are those of OCP's Microscaling Formats specification 1.0, which stores scales as powers
of two (e8m0).
"""

from __future__ import annotations

import numpy as np

__all__ = ["FP4_BITS", "FP4_CODES", "FP4_ZERO", "half_scales"]

FP4_BITS = 5  # that 25 codes need
FP4_ZERO = 12
_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)  # the values of the lower three bits; the fourth is the sign
FP4_CODES = np.array(
    [*(FP4_ZERO + twice for twice in _TWICE), *(FP4_ZERO - twice for twice in _TWICE)], np.uint8
)


def half_scales(exponents: np.ndarray) -> np.ndarray:
    """Half the scales that e8m0 bytes stand for, fp32 of the same shape."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)
