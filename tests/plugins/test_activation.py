"""Per-token activation quantisation and the saturating cast against scalar arithmetic and
hand-computed rows.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from plugins.core.activation import TINY, quantize_activation, saturate_cast
from tests.plugins.kernel_cases import BF16, F16, F32, tokens

ONE = np.float32(1)


def scalar_row(x: np.ndarray, bits: int, symmetric: bool) -> tuple[list[int], np.float32, int]:
    """The definition, one number and one rounded fp32 operation at a time."""
    values = [np.float32(v) for v in x]
    top = 2 ** (bits - 1) - 1
    if symmetric:
        extent, steps, bottom, low = max(abs(v) for v in values), top, np.float32(0), -top
    else:
        bottom = min(*values, np.float32(0))
        extent, steps, low = max(*values, np.float32(0)) - bottom, 2**bits - 1, -top - 1
    scale = max(extent, TINY) / np.float32(steps)
    inverse = ONE / scale
    zero = (
        0 if symmetric else min(max(round(float(-bottom * inverse)) + low, low), top)
    )  # Python rounds half to even
    return [min(max(round(float(v * inverse)) + zero, low), top) for v in values], scale, zero


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_equals_scalar_arithmetic(dtype: np.dtype[np.generic], bits: int, symmetric: bool) -> None:
    x = tokens(9, 40, dtype, seed=bits)
    x[3] = abs(x[3])
    x[4] = -abs(x[4])
    x[5] = 0
    x[6] *= np.asarray(2.0**-20, dtype)  # subnormal in fp16
    codes, scale, zero = quantize_activation(x, bits, symmetric)
    assert (codes.dtype, scale.dtype, zero.dtype) == (np.int8, np.float32, np.int32)
    assert (codes.shape, scale.shape, zero.shape) == ((9, 40), (9, 1), (9, 1))
    for row in range(9):
        want_codes, want_scale, want_zero = scalar_row(x[row], bits, symmetric)
        assert (codes[row].tolist(), scale[row, 0], zero[row, 0]) == (
            want_codes,
            want_scale,
            want_zero,
        )


def test_symmetric_row_by_hand() -> None:
    codes, scale, zero = quantize_activation(
        np.array([[-127, 126.5, 125.5, 0.5, -0.5, 1.5]], np.float32), 8, True
    )
    assert codes.tolist() == [[-127, 126, 126, 0, 0, 2]]  # halves go to the even code
    assert scale.tolist() == [[1.0]]
    assert zero.tolist() == [[0]]


def test_asymmetric_row_by_hand() -> None:
    codes, scale, zero = quantize_activation(np.array([[-5, 10, 0, 4.5]], np.float32), 4, False)
    assert scale.tolist() == [[1.0]]  # range 15 in 15 steps
    assert zero.tolist() == [[-3]]  # 5 - 8
    assert codes.tolist() == [[-8, 7, -3, 1]]  # 4.5 rounds to 4, minus 3


def test_asymmetric_range_includes_zero() -> None:
    """All-positive and all-negative rows keep the zero point inside the codes."""
    _, scale, zero = quantize_activation(np.array([[200, 255], [-255, -200]], np.float32), 8, False)
    assert scale.tolist() == [[1.0], [1.0]]
    assert zero.tolist() == [[-128], [127]]


def test_both_ends_rounding_up_are_clamped() -> None:
    """127.5 steps on either side of zero: the largest code would be one too many."""
    codes, _, zero = quantize_activation(np.array([[-127.5, 127.5]], np.float32), 8, False)
    assert zero.tolist() == [[0]]
    assert codes.tolist() == [[-128, 127]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_bits(symmetric: bool) -> None:
    codes, _, _ = quantize_activation(np.array([[-3, -1, 0, 1, 3]], np.float32), 2, symmetric)
    assert codes.tolist() == (
        [[-1, 0, 0, 0, 1]] if symmetric else [[-2, 0, 0, 0, 1]]
    )  # zero point 0, 3 / 2 + 0 clamped to 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_trap_18_zero_tokens_have_a_normal_scale(bits: int, symmetric: bool) -> None:
    """No division by zero: the scale is a normal number, its reciprocal finite, and every code is
    the zero point.
    """
    for value in (0.0, -0.0):
        codes, scale, zero = quantize_activation(
            np.full((1, 5), value, np.float32), bits, symmetric
        )
        assert scale[0, 0] >= np.finfo(np.float32).smallest_normal
        assert np.isfinite(ONE / scale[0, 0])
        assert (codes == zero).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_rows_are_loud_and_alone(bad: float, symmetric: bool) -> None:
    x = tokens(3, 8, F32)
    clean = quantize_activation(x, 8, symmetric)
    x[1, 3] = bad
    codes, scale, zero = quantize_activation(x, 8, symmetric)
    assert np.isnan(scale[:, 0]).tolist() == [False, True, False]
    assert not codes[1].any() and not zero[1].any()
    for got, want in zip((codes, scale, zero), clean, strict=True):
        np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])


def test_range_beyond_fp32_is_loud() -> None:
    largest = np.finfo(np.float32).max
    _, scale, _ = quantize_activation(np.array([[-largest, largest]]), 8, False)
    assert np.isnan(scale).all()
    codes, scale, _ = quantize_activation(np.array([[-largest, largest]]), 8, True)
    assert np.isfinite(scale).all()
    assert codes.tolist() == [[-127, 127]]


def test_no_tokens() -> None:
    assert [part.shape for part in quantize_activation(np.zeros((0, 7), np.float16), 8, False)] == [
        (0, 7),
        (0, 1),
        (0, 1),
    ]


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(F16, 65504.0), (BF16, float(ml_dtypes.finfo(BF16).max))],
    ids=["fp16", "bf16"],
)
def test_trap_25_output_saturates(dtype: np.dtype[np.generic], largest: float) -> None:
    y = np.array([3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1.5, -0.0], np.float32)
    got = saturate_cast(y, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(
        got.astype(np.float64), [largest, -largest, largest, -largest, np.nan, 1.5, -0.0]
    )
    assert np.signbit(got[-1])


def test_fp32_output_is_untouched() -> None:
    y = np.array([np.inf, np.nan, 3e38], np.float32)
    assert saturate_cast(y, np.float32) is y
