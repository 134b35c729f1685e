"""How a cache of few bits is stored, in numpy: the one definition that the function body and the native
kernel reproduce.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from plugins.core.activation import quantize_activation, saturate_cast

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = ["BYTE_OFFSET", "SCALES", "stored", "stored_values"]

BYTE_OFFSET = 128  # bytes are stored as int8, since TensorRT has no others: byte - 128
SCALES = 2  # numbers that a row has beside its codes: scale and zero point


def stored(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values as a cache of few bits holds them.

    Codes are asymmetric, with a scale and a zero point for each row; of 8 numbers' codes plus
    2^(bits-1), the first byte has their lowest bits, number i in bit i. Bytes of one bit of all
    numbers of a row follow each other: bytes [bits, D / 8].

    Args:
        x: [..., D] of any float type; D is a multiple of 8.
        bits: 2..8.

    Returns:
        bytes - BYTE_OFFSET int8 [..., bits D / 8]; scale and zero point fp32 [..., 2].
    """
    width = x.shape[-1]
    codes, scale, zero = quantize_activation(x.reshape(-1, width), bits, False)
    up = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    planes = [np.packbits(up >> bit & 1, axis=-1, bitorder="little") for bit in range(bits)]
    packed = (np.concatenate(planes, -1) ^ BYTE_OFFSET).view(np.int8)
    both = np.concatenate([scale, zero.astype(np.float32)], -1)
    lead = x.shape[:-1]
    return packed.reshape(*lead, bits * width // 8), both.reshape(*lead, SCALES)


def stored_values(
    packed: np.ndarray, scales: np.ndarray, bits: int, dtype: DTypeLike
) -> np.ndarray:
    """What stored() rows stand for, (code - zero) * scale in fp32, rounded to the model's type.

    Args:
        packed, scales: as stored() returns them.
    """
    lead = packed.shape[:-1]
    bytes_ = (packed.astype(np.int16) + BYTE_OFFSET).astype(np.uint8)
    planes = bytes_.reshape(*lead, bits, packed.shape[-1] // bits)
    one_bit = np.unpackbits(planes, axis=-1, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.int16)
    codes = np.einsum("...bd,b->...d", one_bit, weights) - (1 << (bits - 1))
    scale, zero = scales[..., :1], scales[..., 1:]
    with np.errstate(invalid="ignore"):
        values = (codes.astype(np.float32) - zero) * scale
    return saturate_cast(values, dtype)
