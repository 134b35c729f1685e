"""Random weights and activations for the tests of the GEMM ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from plugins import op_spec
from plugins.core.op_spec import GemmAttributes, QuantArrays

__all__ = [
    "BF16",
    "F16",
    "F32",
    "LEVELS",
    "abq",
    "abq_arrays",
    "assert_close",
    "assert_same_bits",
    "both_ops",
    "op_of",
    "qqq",
    "qqq_arrays",
    "tokens",
]

F16, BF16, F32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
LEVELS = [(bits, 2**bits) for bits in range(1, 9)] + [
    (1, 3),
    (2, 5),
]  # (wbits, levels), the last two balanced


def abq(
    n: int,
    k: int,
    *,
    w: tuple[int, int] = (4, 16),
    a: int = 8,
    sym: int = 0,
    g: int = 0,
    bias: int = 0,
    minimum: int = 0,
) -> GemmAttributes:
    return GemmAttributes(w[0], w[1], a, sym, g, k, n, bias, has_minimum=minimum)


def qqq(n: int, k: int, *, g: int = 0, bias: int = 0) -> GemmAttributes:
    return GemmAttributes(4, 16, 8, 1, g, k, n, bias)


def op_of(arrays: QuantArrays) -> str:
    return "QQQGemm" if arrays.codes.dtype == np.int8 else "ABQGemm"


def abq_arrays(attrs: GemmAttributes, seed: int = 0) -> QuantArrays:
    """Random weights; a third of the zero points lie outside the code range, and so does 0 for a
    third of the groups with a minimum.
    """
    rng = np.random.default_rng(seed)
    n, groups = attrs.out_features, attrs.n_groups
    arrays = QuantArrays(
        codes=rng.integers(0, attrs.levels, (n, attrs.in_features), dtype=np.uint8),
        scale=rng.uniform(0.001, 0.02, (n, groups)).astype(np.float32),
        zero=rng.integers(-attrs.levels, 2 * attrs.levels, (n, groups), dtype=np.int32),
        bias=rng.normal(0, 3, n).astype(np.float32) if attrs.has_bias else None,
    )
    if not attrs.has_minimum:
        return arrays
    code = rng.uniform(-attrs.levels, 2 * attrs.levels, (n, groups))
    return replace(arrays, zero=None, minimum=(-code * arrays.scale).astype(np.float32))


def qqq_arrays(attrs: GemmAttributes, seed: int = 0) -> QuantArrays:
    """Random weights; some group scales are so large that the int8 weight clamps at +-127, and half
    of the finest scales are negative.
    """
    rng = np.random.default_rng(seed)
    n = attrs.out_features
    scale = rng.uniform(0.0001, 0.002, (n, 1)).astype(np.float32)
    group = rng.uniform(2, 22, (n, attrs.n_groups)).astype(np.float16) if attrs.group_size else None
    finest = scale if group is None else group
    finest *= rng.choice(np.array([-1, 1], finest.dtype), finest.shape)
    return QuantArrays(
        codes=rng.integers(-8, 8, (n, attrs.in_features), dtype=np.int8),
        scale=scale,
        scale_group=group,
        bias=rng.normal(0, 3, n).astype(np.float32) if attrs.has_bias else None,
    )


def tokens(m: int, k: int, dtype: np.dtype[Any], seed: int = 0) -> np.ndarray:
    """x [m, k]: normal values around 0.3 with a few outliers."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.normal(0.3, 1, (m, k))
    x[rng.random((m, k)) < 0.02] *= 30
    return x.astype(dtype)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to the last bit, and NaN where the other is NaN."""
    got_nan, want_nan = np.isnan(got.astype(np.float32)), np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(got_nan, want_nan)
    word = np.uint16 if got.itemsize == 2 else np.uint32
    np.testing.assert_array_equal(
        np.where(got_nan, 0, got.view(word)), np.where(want_nan, 0, want.view(word))
    )


def assert_close(
    got: np.ndarray,
    want: np.ndarray,
    attrs: GemmAttributes,
    arrays: QuantArrays,
    x: np.ndarray,
    reordered: bool = False,
) -> None:
    """Equal to the last bit; with A16, or fp32 terms of groups added in another order, within their
    rounding.
    """
    assert want.dtype == got.dtype == x.dtype
    if attrs.abits < 16 and not reordered:
        assert_same_bits(got, want)
        return
    np.testing.assert_array_equal(
        np.isnan(got.astype(np.float32)), np.isnan(want.astype(np.float32))
    )
    spec, minimum = op_spec(op_of(arrays)), arrays.minimum
    if minimum is not None:  # a term of its own
        arrays = replace(arrays, minimum=np.abs(minimum))
    weight = spec.dequantize(arrays, attrs).astype(np.float64)
    # [M, N] sum of |terms|, to which the rounding error is proportional
    size = np.abs(x.astype(np.float64)) @ np.abs(weight).T + 3
    error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    rounding = float(ml_dtypes.finfo(x.dtype).eps) * np.abs(want.astype(np.float64))
    assert not (error > 1e-5 * size + rounding).any(), error.max()


def both_ops(k: int = 192) -> Sequence[tuple[GemmAttributes, QuantArrays]]:
    """A few attributes of either op with K = 192."""
    abq_attrs = [abq(6, k, a=8, sym=0), abq(6, k, a=4, sym=1, g=48), abq(6, k, a=2, sym=0, g=64)]
    qqq_attrs = [qqq(6, k), qqq(6, k, g=64)]
    return [(a, abq_arrays(a)) for a in abq_attrs] + [(a, qqq_arrays(a)) for a in qqq_attrs]
