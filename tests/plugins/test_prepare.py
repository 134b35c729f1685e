"""The token kernels against numpy: every order bit for bit, on the CPU simulation and, where there
is one, on a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.kernel_cases import BF16, F16, F32, assert_same_bits, tokens
from tests.plugins.kernel_runner import KernelError, KernelRunner
from tests.plugins.prepare_runner import (
    FLOATS,
    NATURAL,
    PLANES,
    SLOTS,
    Case,
    check,
    prepare,
    rms_norm,
    slot_order,
)

ORDERS = pytest.mark.parametrize(
    "kind", [NATURAL, SLOTS, PLANES, FLOATS], ids=["natural", "slots", "planes", "floats"]
)


@pytest.fixture(scope="module")
def runner(gpu_runner: KernelRunner) -> KernelRunner:
    """These are tests of the CUDA kernels alone."""
    return gpu_runner


def case_of(kind: int, k: int, **changes: Any) -> Case:
    return Case(kind, k, **({"abits": 16} if kind == FLOATS else {}) | changes)


@pytest.mark.parametrize("kind", [NATURAL, SLOTS, PLANES])
def test_every_bit_width(runner: KernelRunner, kind: int) -> None:
    for abits, sym, m in itertools.product(range(2, 9), (0, 1), (1, 3)):
        check(
            runner, case_of(kind, 67, abits=abits, symmetric=sym), tokens(m, 67, F16), order=abits
        )


@ORDERS
@pytest.mark.parametrize(
    "k", [1, 2, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 1016, 1024, 1025, 1096]
)
def test_lengths_around_words_and_chunks(runner: KernelRunner, kind: int, k: int) -> None:
    for m in (1, 2):
        check(runner, case_of(kind, k, symmetric=m % 2), tokens(m, k, F16), order=k)


@ORDERS
@pytest.mark.parametrize("m", [7, 8, 9, 33, 129])
def test_numbers_of_tokens(runner: KernelRunner, kind: int, m: int) -> None:
    """Rows meet the swizzle of 8 and the padding to 128."""
    check(runner, case_of(kind, 72, n_counters=200), tokens(m, 72, BF16), order=m)


@pytest.mark.parametrize("kind", [SLOTS, PLANES, FLOATS], ids=["slots", "planes", "floats"])
@pytest.mark.parametrize(
    ("k", "g"),
    [
        (5, 1),
        (24, 8),
        (99, 33),
        (120, 40),
        (96, 32),
        (62, 31),
        (192, 64),
        (384, 128),
        (130, 65),
        (2304, 1152),
        (520, 104),
    ],
)
def test_groups(runner: KernelRunner, kind: int, k: int, g: int) -> None:
    """Units of 4, 2 and 1 words, groups that end inside a word, sums of groups shorter and longer
    than a warp.
    """
    for abits, dtype in ((3, F16), (8, BF16)):
        check(
            runner,
            case_of(kind, k, group_size=g, **({} if kind == FLOATS else {"abits": abits})),
            tokens(3, k, dtype),
            order=g,
        )


@ORDERS
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_dtypes_and_alignment(runner: KernelRunner, kind: int, dtype: np.dtype[Any]) -> None:
    """16-byte loads where x allows them, single elements where x starts or its rows end in between."""
    if kind == FLOATS and dtype == F32:
        pytest.skip("fp32 values have no 16-bit order")
    for k, offset in ((160, 0), (160, 1), (160, 3), (161, 0), (164, 0)):
        check(runner, case_of(kind, k), tokens(2, k, dtype), offset=offset)


@ORDERS
@pytest.mark.parametrize("order", range(5))
def test_any_thread_order(runner: KernelRunner, kind: int, order: int) -> None:
    for k, g in ((2600, 0), (2600, 0 if kind == NATURAL else 1300)):
        check(runner, case_of(kind, k, group_size=g), tokens(2, k, F16), order=order)


@ORDERS
def test_long_rows(runner: KernelRunner, kind: int) -> None:
    """A few tokens are shared out to several blocks unless they add up sums; rows of more than 64
    KiB are read again.
    """
    shared_out = case_of(kind, 8320, with_sums=False)
    check(runner, shared_out, tokens(1, 8320, F16))
    check(runner, shared_out, tokens(3, 8320, F16))
    check(runner, case_of(kind, 8320), tokens(1, 8320, F16))
    if kind in (SLOTS, PLANES):
        check(runner, case_of(kind, 8320, group_size=128), tokens(1, 8320, F16))
    check(runner, case_of(kind, 33_001), tokens(1, 33_001, F16))
    if kind != FLOATS:
        check(runner, case_of(kind, 16_904, with_sums=False), tokens(2, 16_904, F32))


@pytest.mark.parametrize("kind", [NATURAL, SLOTS, PLANES])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_extreme_rows(runner: KernelRunner, kind: int, dtype: np.dtype[Any]) -> None:
    """Zeros, negative zeros, the largest and the smallest numbers, halves that round to even, one
    sign only, NaN and infinity.
    """
    info, rng = ml_dtypes.finfo(dtype), np.random.default_rng(0)
    x = tokens(14, 200, dtype)
    x[0], x[1], x[2] = 0, -0.0, info.max
    x[3] = float(info.max) / 4 * rng.choice([-1, 1], 200)
    x[4] = float(info.smallest_normal) * rng.normal(0, 2, 200)
    x[5] = float(info.smallest_subnormal)
    x[6] = np.arange(-100, 100) + 0.5
    x[7], x[8] = abs(x[7]), -abs(x[8])
    x[9, 0] = x[9, 199] = np.nan
    x[10, 77], x[11, 199], x[12, :] = np.inf, -np.inf, np.nan
    x[13] = float(info.max) * rng.choice(
        [-1, 1], 200
    )  # an infinite range in fp32, of finite numbers
    for abits, symmetric in itertools.product((2, 5, 8), (0, 1)):
        got = check(runner, case_of(kind, 200, abits=abits, symmetric=symmetric), x)
        assert np.isnan(got.scale[9:13]).all()
        assert np.isfinite(got.scale[:9]).all()


def test_floats_are_kept_bit_for_bit(runner: KernelRunner) -> None:
    for dtype in (F16, BF16):
        x = np.arange(1 << 16, dtype=np.uint16).reshape(8, -1).view(dtype)
        check(runner, case_of(FLOATS, x.shape[1]), x)


def test_more_counters_than_threads(runner: KernelRunner) -> None:
    for m in (1, 3):
        check(runner, case_of(SLOTS, 40, n_counters=1000), tokens(m, 40, F16))


def test_no_tokens(runner: KernelRunner) -> None:
    prepare(runner, case_of(SLOTS, 64, n_counters=0), tokens(0, 64, F16))


def test_refused_shapes(runner: KernelRunner) -> None:
    x = tokens(2, 96, F16)
    refused = [
        (case_of(NATURAL, 96, group_size=32), x),
        (case_of(SLOTS, 96, group_size=64), x),  # not a divisor
        (case_of(SLOTS, 96, abits=1), x),
        (case_of(PLANES, 96, abits=9), x),
        (case_of(FLOATS, 96, abits=8), x),
        (case_of(FLOATS, 96), x.astype(F32)),
        (case_of(4, 96), x),
    ]
    for case, values in refused:
        with pytest.raises(KernelError) as error:
            prepare(runner, case, values)
        assert error.value.code == 1
    with pytest.raises(KernelError):  # a residual is part of a norm
        prepare(runner, case_of(SLOTS, 96), x, residual=x)


def normed_by_kernel(runner: KernelRunner, case: Case, x: np.ndarray, **inputs: Any) -> np.ndarray:
    """y [m, k] of the fused norm: the values that kSlotFloats writes, put back in order."""
    floats = replace(case, order=FLOATS, abits=16)
    rows = prepare(runner, floats, x, **inputs).rows.view(x.dtype)
    row = np.empty_like(rows)
    row[:, slot_order(floats)] = rows
    groups = row[:, : 32 * case.n_groups * case.group_words].reshape(len(x), case.n_groups, -1)
    return np.ascontiguousarray(groups[:, :, : case.group_len].reshape(len(x), case.k))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm(runner: KernelRunner, dtype: np.dtype[Any], with_residual: bool) -> None:
    """v is exact; y is the wide result rounded once, but for near ties; codes, scales and zeros are
    exactly those of y.
    """
    for m, k, g in ((3, 72, 0), (2, 129, 43), (1, 8320, 0), (1, 33_001, 0)):
        x, gamma = tokens(m, k, dtype), tokens(1, k, dtype, seed=1)[0]
        inputs = (
            {"gamma": gamma, "residual": tokens(m, k, dtype, seed=2)}
            if with_residual
            else {"gamma": gamma}
        )
        case = case_of(SLOTS, k, group_size=g)
        v, wide = rms_norm(x, gamma, inputs.get("residual"), case.epsilon)
        y = normed_by_kernel(runner, case, x, **inputs)
        once = wide.astype(dtype)
        assert (y == once).mean() > 0.99
        spacing = np.maximum(
            np.abs(wide) * float(ml_dtypes.finfo(dtype).eps),
            float(ml_dtypes.finfo(dtype).smallest_subnormal),
        )
        assert (np.abs(y.astype(np.float64) - wide) <= 0.51 * spacing).all()
        for kind in (NATURAL, SLOTS, PLANES):
            if kind == NATURAL and g:
                continue
            got = check(runner, replace(case, order=kind), x, y=y, order=k, **inputs)
            if with_residual:
                np.testing.assert_array_equal(got.residual_out.view(np.uint16), v.view(np.uint16))


@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_of_fp32(runner: KernelRunner, with_residual: bool) -> None:
    x, gamma = tokens(2, 200, F32), tokens(1, 200, F32, seed=1)[0]
    inputs = (
        {"gamma": gamma, "residual": tokens(2, 200, F32, seed=2)}
        if with_residual
        else {"gamma": gamma}
    )
    case = case_of(NATURAL, 200)
    v, wide = rms_norm(x, gamma, inputs.get("residual"), case.epsilon)
    got = prepare(runner, case, x, **inputs)
    codes = got.rows.view(np.int8)[:, :200].astype(np.float64)
    np.testing.assert_allclose(
        got.scale, (np.maximum(wide.max(1), 0) - np.minimum(wide.min(1), 0)) / 255, rtol=1e-6
    )
    assert (
        np.abs((codes - got.zero[:, None]) * got.scale[:, None] - wide) <= 0.51 * got.scale[:, None]
    ).all()
    if with_residual:
        assert_same_bits(got.residual_out, v)


@pytest.mark.parametrize("k", [4160, 33_001])
def test_norm_does_not_depend_on_the_other_tokens(runner: KernelRunner, k: int) -> None:
    """The same bits from one token alone, shared out to several blocks, and among many; also where
    rows are read again.
    """
    many = 65 if k < 10_000 else 3
    gamma, case = tokens(1, k, F16, seed=1)[0], case_of(SLOTS, k, with_sums=False)
    x = np.repeat(tokens(1, k, F16), many, 0)
    x[1:-1] = 1  # rows that are quickly made
    residual = np.repeat(tokens(1, k, F16, seed=2), many, 0)
    alone = prepare(runner, case, x[:1], gamma=gamma, residual=residual[:1])
    among = prepare(runner, case, x, gamma=gamma, residual=residual)
    for row in (0, many - 1):
        assert_same_bits(among.scale[row : row + 1], alone.scale)
        np.testing.assert_array_equal(among.rows[row], alone.rows[0])
        np.testing.assert_array_equal(
            among.residual_out[row].view(np.uint16), alone.residual_out[0].view(np.uint16)
        )


def test_rows_of_a_norm_with_nan_or_infinity(runner: KernelRunner) -> None:
    x, gamma = tokens(5, 96, F16), tokens(1, 96, F16, seed=1)[0]
    x[1, 5], x[2, 7], x[3] = np.nan, np.inf, 0
    got = prepare(runner, case_of(SLOTS, 96), x, gamma=gamma)
    np.testing.assert_array_equal(np.isnan(got.scale), [False, True, True, False, False])
    assert not got.rows[1:3].any()
    assert not got.zero[1:3].any()
