"""Per-token norm and quantisation: the one definition that every kernel, ONNX body and torch twin
reproduces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = ["TINY", "quantize_activation", "rms_norm", "saturate_cast"]

TINY = np.float32(
    2.0**-118
)  # floor of a row's extent: TINY / 255 is a normal number and its reciprocal is finite


def quantize_activation(
    x: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed integer codes of each row, x ~ scale * (code - zero); all maths in fp32, rounding half
    to even.

    Symmetric: scale = absmax / (2^(bits-1) - 1), zero = 0. Asymmetric: the range is widened to hold
    0 and has 2^bits - 1 steps. A row with NaN or inf gets a NaN scale (and codes 0), so that it
    stays loud. Source: per-token min-max quantisation as in QQQ (arXiv 2406.09904) and ABQ-LLM
    (arXiv 2408.08554), with a scale floor instead of a division by 0.

    Args:
        x: [M, K] of any float type.
        bits: 2..8.

    Returns:
        codes int8 [M, K], scale fp32 [M, 1], zero int32 [M, 1].
    """
    x = np.asarray(x, np.float32)
    low_code, high_code = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        if symmetric:
            extent, steps, low_code = np.abs(x).max(-1, keepdims=True), high_code, -high_code
        else:
            low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
            extent, steps = (
                np.maximum(x.max(-1, keepdims=True), np.float32(0)) - low,
                np.float32((1 << bits) - 1),
            )
        scale = np.maximum(extent, TINY) / steps + (extent - extent)
        reciprocal = np.float32(1) / scale
        zero = (
            np.zeros_like(scale)
            if symmetric
            else np.clip(np.rint(-low * reciprocal) + low_code, low_code, high_code)
        )
        codes = np.clip(np.rint(x * reciprocal) + zero, low_code, high_code)
    bad = ~np.isfinite(scale)
    codes, zero = np.where(bad, np.float32(0), codes), np.where(bad, np.float32(0), zero)
    return codes.astype(np.int8), scale, zero.astype(np.int32)


def rms_norm(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    """RMSNorm(x) * gamma over the last axis in x's type: fp64, rounded to fp32 and then to the
    type, as a Cast does.

    The fast kernels compute it in fp32 and may be one last bit off; everything else gives these
    bits.

    Args:
        x: [..., K] of fp16, bf16 of ml_dtypes, or fp32.
        gamma: [K].
        epsilon: taken as fp32, as an ONNX attribute holds it.
    """
    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        inverse_rms = 1 / np.sqrt(
            (wide * wide).mean(-1, keepdims=True) + np.float64(np.float32(epsilon))
        )
        return np.asarray(
            (wide * inverse_rms * gamma.astype(np.float64)).astype(np.float32), x.dtype
        )


def saturate_cast(y: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """fp32 to a narrower float: finite overflow gives the largest finite value, NaN stays NaN.

    Args:
        y: fp32, any shape.
        dtype: np.float16, the bfloat16 of ml_dtypes, or np.float32 (returned as it is).
    """
    target = np.dtype(dtype)
    if target == np.float32:
        return y
    import ml_dtypes

    largest = np.float32(ml_dtypes.finfo(target).max)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.clip(y, -largest, largest), target)
