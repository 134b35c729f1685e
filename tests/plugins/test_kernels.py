"""The kernels against the numpy references: bit for bit natively on a CPU, with each of its
instruction sets, on the simulation of a GPU and, where there is one, on a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from plugins import op_spec
from plugins.core.activation import quantize_activation
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.tools.kernels import ANY_TACTIC, SIMPLE, gemm_shape
from tests.plugins.kernel_cases import (
    BF16,
    F16,
    F32,
    LEVELS,
    abq,
    abq_arrays,
    assert_close,
    assert_same_bits,
    both_ops,
    op_of,
    qqq,
    qqq_arrays,
    tokens,
)
from tests.plugins.kernel_runner import KernelError, KernelRunner


def check(
    runner: KernelRunner,
    attrs: GemmAttributes,
    arrays: QuantArrays,
    x: np.ndarray,
    order: int = 1,
    tactic: int = 0,
) -> np.ndarray:
    """Run the kernel and compare it with reference(); returns y."""
    spec = op_spec(op_of(arrays))
    tensors = spec.pack(arrays, attrs, "test")
    runner.set_order(order)
    y = runner.gemm(spec.name, attrs, x, tensors, tactic=tactic)
    assert_close(y, spec.reference(x, tensors, attrs), attrs, arrays, x)
    return y


@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_abq_every_bit_width(runner: KernelRunner, w: tuple[int, int]) -> None:
    for abits, sym in itertools.product(range(2, 9), (0, 1)):
        attrs = abq(5, 67, w=w, a=abits, sym=sym)
        check(runner, attrs, abq_arrays(attrs), tokens(2, 67, F16), order=abits)


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 63, 65, 127, 128, 129, 255, 256, 257])
def test_abq_sizes_around_words_and_blocks(runner: KernelRunner, k: int) -> None:
    for n, m in ((1, 5), (63, 1), (64, 2), (65, 1)):
        attrs = abq(n, k, w=(3, 8), sym=k % 2, bias=n % 2)
        check(runner, attrs, abq_arrays(attrs), tokens(m, k, F16), order=n)


@pytest.mark.parametrize("abits", [4, 8, 16])
@pytest.mark.parametrize(
    ("k", "g"),
    [(8, 8), (24, 8), (99, 33), (120, 40), (96, 32), (62, 31), (192, 64), (384, 128), (130, 65)],
)
def test_abq_groups(runner: KernelRunner, k: int, g: int, abits: int) -> None:
    for w, sym in (((2, 5), 0), ((4, 16), 1)):
        attrs = abq(9, k, w=w, a=abits, sym=sym, g=g, bias=1)
        check(runner, attrs, abq_arrays(attrs), tokens(3, k, F16), order=g)


@pytest.mark.parametrize(("k", "g"), [(67, 0), (96, 16), (96, 32), (90, 45), (384, 128)])
def test_abq_minimums(runner: KernelRunner, k: int, g: int) -> None:
    for a, sym, w, dtype in (
        (8, 0, (4, 16), F16),
        (8, 1, (8, 256), F32),
        (2, 0, (2, 4), BF16),
        (16, 0, (6, 64), F16),
        (16, 0, (4, 16), F32),
    ):
        attrs = abq(9, k, w=w, a=a, sym=sym, g=g, bias=1, minimum=1)
        check(runner, attrs, abq_arrays(attrs), tokens(3, k, dtype), order=k)


def test_which_op_takes_minimums(runner: KernelRunner) -> None:
    """A shape with minimums needs them, whatever else there is; QQQGemm takes none."""
    attrs = abq(4, 64, minimum=1)
    arrays, x = abq_arrays(attrs), tokens(1, 64, F16)
    tensors = op_spec("ABQGemm").pack(arrays, attrs, "test")
    tensors["zero"] = np.zeros((4, 1), np.int32)
    y = runner.gemm("ABQGemm", attrs, x, tensors)
    assert_close(y, op_spec("ABQGemm").reference(x, tensors, attrs), attrs, arrays, x)
    del tensors["minimum"]
    with pytest.raises(KernelError, match="error 1"):
        runner.gemm("ABQGemm", attrs, x, tensors)
    shape = gemm_shape(replace(qqq(64, 64), has_minimum=1), 1, F16)
    assert runner.kernels.workspace_bytes("QQQGemm", shape) == 0


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("bias", [0, 1])
def test_dtypes_and_bias(runner: KernelRunner, dtype: np.dtype[Any], bias: int) -> None:
    for abits, g in itertools.product((5, 8, 16), (0, 45)):
        attrs = abq(7, 90, a=abits, g=g, bias=bias)
        check(runner, attrs, abq_arrays(attrs), tokens(3, 90, dtype))
    for g in (0, 64, 128):
        attrs = qqq(7, 256, g=g, bias=bias)
        check(runner, attrs, qqq_arrays(attrs), tokens(3, 256, dtype))


@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_abq_weight_only(runner: KernelRunner, w: tuple[int, int]) -> None:
    for k in (1, 33, 129):
        attrs = abq(66, k, w=w, a=16)
        check(runner, attrs, abq_arrays(attrs), tokens(2, k, F16))


@pytest.mark.parametrize("k", [1, 4, 15, 16, 17, 31, 33, 127, 128, 129, 1021])
def test_qqq_per_channel_sizes(runner: KernelRunner, k: int) -> None:
    for n, m in ((1, 5), (63, 1), (64, 2), (65, 1), (130, 1)):
        attrs = qqq(n, k, bias=n % 2)
        check(runner, attrs, qqq_arrays(attrs), tokens(m, k, F16), order=n)


@pytest.mark.parametrize(("k", "g"), [(64, 64), (192, 64), (128, 128), (384, 128)])
def test_qqq_groups(runner: KernelRunner, k: int, g: int) -> None:
    for n, m in ((1, 5), (63, 1), (65, 2), (192, 1)):
        attrs = qqq(n, k, g=g, bias=n % 2)
        check(runner, attrs, qqq_arrays(attrs), tokens(m, k, F16), order=n)


@pytest.mark.parametrize("order", range(6))
def test_any_thread_order(runner: KernelRunner, order: int) -> None:
    for attrs, arrays in both_ops():
        check(runner, attrs, arrays, tokens(5, 192, F32), order=order)


def test_no_tokens(runner: KernelRunner) -> None:
    for attrs, arrays in both_ops():
        assert check(runner, attrs, arrays, tokens(0, 192, F16)).shape == (0, 6)


def test_all_zero_tokens_give_the_bias(runner: KernelRunner) -> None:
    """A zero row has range 0: its scale must not become 0 and its codes not NaN."""
    for attrs, arrays in both_ops():
        bias = np.arange(6, dtype=np.float32) - 2.5
        attrs, arrays = replace(attrs, has_bias=1), replace(arrays, bias=bias)
        for zero in (0.0, -0.0):
            x = tokens(3, 192, F16)
            x[1] = zero
            y = check(runner, attrs, arrays, x)
            np.testing.assert_array_equal(y[1], bias.astype(F16))


def test_extreme_finite_inputs(runner: KernelRunner) -> None:
    rng = np.random.default_rng(3)
    for (attrs, arrays), dtype in itertools.product(both_ops(), (F16, BF16, F32)):
        info = ml_dtypes.finfo(dtype)
        x = tokens(7, 192, dtype)
        x[0, 5] = 6e4  # one outlier: every other code becomes 0 or the zero point
        x[1] = np.float32(info.smallest_subnormal) * rng.integers(-3, 4, 192)
        x[2] = np.where(rng.random(192) < 0.5, -0.0, 0.0)
        x[2, 0] = 1
        x[3] = (
            np.abs(x[3].astype(np.float32)) + 1
        )  # all positive: the asymmetric range still includes 0
        x[4] = -x[3]
        x[5] = float(info.max) / 4 * rng.choice([-1, 1], 192)
        x[6] = float(info.smallest_normal) * rng.normal(0, 2, 192)
        check(runner, attrs, arrays, x)


def test_rows_with_nan_or_inf_are_nan_and_only_those(runner: KernelRunner) -> None:
    for (attrs, arrays), bad in itertools.product(both_ops(), (np.nan, np.inf, -np.inf)):
        x = tokens(4, 192, F16)
        x[1, 0] = x[3, 191] = bad
        y = check(runner, attrs, arrays, x)
        np.testing.assert_array_equal(np.isnan(y).all(axis=1), [False, True, False, True])
        assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(F16, 65504.0), (BF16, float(ml_dtypes.finfo(BF16).max))],
    ids=["fp16", "bf16"],
)
def test_overflow_saturates(runner: KernelRunner, dtype: np.dtype[Any], largest: float) -> None:
    """An output beyond the type's range becomes its largest finite number, for each sign and for
    either op.
    """
    weight_only = abq(6, 192, a=16)
    for attrs, arrays in [*both_ops(), (weight_only, abq_arrays(weight_only))]:
        sign = np.where(np.arange(6) % 2, -1, 1).astype(np.float32)
        bias = sign * np.float32(3.4e38)
        x = (tokens(2, 192, F32) * 1e-3).astype(dtype)
        y = check(runner, replace(attrs, has_bias=1), replace(arrays, bias=bias), x)
        np.testing.assert_array_equal(
            y.astype(np.float32), np.broadcast_to(sign * np.float32(largest), (2, 6))
        )


def test_zero_points_far_outside_the_code_range(runner: KernelRunner) -> None:
    attrs = abq(5, 100, g=50, sym=0)
    arrays = abq_arrays(attrs)
    zero = np.array(
        [[-(2**31), 2**31 - 1], [-10_000, 10_000], [-1, 16], [0, 15], [255, -255]], np.int32
    )
    check(runner, attrs, replace(arrays, zero=zero), tokens(3, 100, F32))
    attrs = replace(attrs, abits=16)
    check(runner, attrs, replace(arrays, zero=zero), tokens(3, 100, F32))


def test_largest_sums_do_not_overflow(runner: KernelRunner) -> None:
    """Every code at its limit, at the longest rows that check() takes: 128 * 255 * K and 127 * 127
    * K just below 2^31.
    """
    k = 65_793
    attrs = abq(2, k, w=(8, 256), sym=0)
    codes = np.stack([np.full(k, 255, np.uint8), np.zeros(k, np.uint8)])
    one = np.ones((2, 1), np.float32)
    arrays = QuantArrays(codes, one, np.array([[0], [255]], np.int32))
    x = np.concatenate([np.full((1, k), -3.0), np.full((1, k), 7.0)]).astype(F32)
    check(runner, attrs, arrays, x)
    k = 133_120
    x = np.concatenate([np.full((1, k), -3.0), np.full((1, k), 7.0)]).astype(F32)
    attrs = qqq(2, k, g=128)
    codes = np.stack([np.full(k, 7, np.int8), np.full(k, -8, np.int8)])
    check(
        runner,
        attrs,
        QuantArrays(codes, one, scale_group=np.full((2, k // 128), 30, np.float16)),
        x,
    )


def test_trap_23_qqq_many_tokens_and_odd_column_blocks(runner: KernelRunner) -> None:
    """N % 128 != 0 with more than 8 * 64 tokens: the shape for which the original's lock array was
    too small.
    """
    attrs = qqq(192, 64, g=64)
    check(runner, attrs, qqq_arrays(attrs), tokens(513, 64, F16))


@pytest.mark.slow
def test_more_tokens_than_the_grid_is_high(runner: KernelRunner) -> None:
    attrs = abq(1, 1, a=16)
    check(runner, attrs, abq_arrays(attrs), tokens(65_538, 1, F16))


def quantised_by_kernel(
    runner: KernelRunner, attrs: GemmAttributes, m: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token scales [m], zero points [m] and codes [m, row] with all padding, as the last call of a
    simple kernel left them in its workspace, whose parts begin at multiples of 128 bytes.
    """
    assert 4 * m <= 128
    scale, rest = runner.workspace[: 4 * m].view(np.float32), runner.workspace[128:]
    if attrs.wbits == 4:  # QQQGemm
        return scale, np.zeros(m, np.int32), rest.view(np.int8).reshape(m, -1)
    words = rest[128:].view(np.uint8).reshape(attrs.abits, m, -1)
    bits = np.unpackbits(words, axis=-1, bitorder="little").astype(np.int32)
    weights = 2 ** np.arange(attrs.abits)
    weights[-1] *= -1
    return scale, rest[: 4 * m].view(np.int32), np.tensordot(weights, bits, 1)


@pytest.mark.parametrize(
    "attrs",
    [abq(3, 90, w=(2, 4), a=a, sym=sym, g=g) for a in (2, 5, 8) for sym in (0, 1) for g in (0, 45)]
    + [qqq(3, 90)],
)
def test_quantised_tokens(gpu_runner: KernelRunner, attrs: GemmAttributes) -> None:
    """Scales, zero points and codes in the workspace are those of quantize_activation, every pad
    code is 0, and so is every code of a row that holds a NaN.
    """
    x = tokens(4, 90, F32)
    x[1] = 0
    arrays = qqq_arrays(attrs) if attrs.wbits == 4 else abq_arrays(attrs)
    check(gpu_runner, attrs, arrays, x, tactic=SIMPLE)
    scale, zero, codes = quantised_by_kernel(gpu_runner, attrs, 4)
    want_codes, want_scale, want_zero = quantize_activation(
        x, attrs.abits, bool(attrs.act_symmetric)
    )
    assert_same_bits(scale, want_scale[:, 0])
    np.testing.assert_array_equal(zero, want_zero[:, 0])
    group_row = attrs.group_len if attrs.wbits == 4 else -(-attrs.group_len // 32) * 32
    padded = np.zeros_like(codes)
    for g in range(attrs.n_groups):
        padded[:, g * group_row :][:, : attrs.group_len] = want_codes[:, g * attrs.group_len :][
            :, : attrs.group_len
        ]
    np.testing.assert_array_equal(codes, padded)
    x[2, 7] = np.nan
    check(gpu_runner, attrs, arrays, x, tactic=SIMPLE)
    scale, zero, codes = quantised_by_kernel(gpu_runner, attrs, 4)
    assert np.isnan(scale[2])
    assert zero[2] == 0
    assert not codes[2].any()


@pytest.mark.parametrize("scratch", [0x00, 0x7F, 0xFF])
def test_trap_24_workspace_needs_no_clearing(runner: KernelRunner, scratch: int) -> None:
    """Whatever an earlier or killed call left in the scratch memory, the result is the same."""
    for attrs, arrays in both_ops():
        x = tokens(5, 192, F16)
        y = check(runner, attrs, arrays, x)
        spec = op_spec(op_of(arrays))
        assert_same_bits(
            runner.gemm(spec.name, attrs, x, spec.pack(arrays, attrs, "test"), scratch=scratch), y
        )


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("ABQGemm", abq(8, 100, g=30)),  # not a divisor of K
        ("ABQGemm", abq(8, 100, g=200)),
        ("ABQGemm", abq(8, 100, a=1)),
        ("ABQGemm", abq(8, 100, a=9)),
        ("ABQGemm", abq(8, 100, w=(3, 5))),
        ("ABQGemm", abq(8, 100, w=(9, 512))),
        ("ABQGemm", abq(8, 65_794, w=(8, 256))),  # int32 sums would overflow
        ("QQQGemm", qqq(8, 128, g=32)),
        ("QQQGemm", qqq(8, 192, g=128)),
        ("QQQGemm", abq(8, 128, sym=0)),
        ("QQQGemm", abq(8, 128, w=(3, 8), sym=1)),
        ("QQQGemm", qqq(8, 133_145)),  # int32 sums would overflow
    ],
)
def test_refused_shapes(runner: KernelRunner, op: str, attrs: GemmAttributes) -> None:
    shape = gemm_shape(attrs, 2, F16)
    assert runner.kernels.workspace_bytes(op, shape) == 0
    with pytest.raises(KernelError) as error:
        runner.call(op, shape, {})
    assert error.value.code == 1


def test_missing_buffers_are_refused(runner: KernelRunner) -> None:
    for op, attrs in (("ABQGemm", abq(8, 64)), ("QQQGemm", qqq(8, 64))):
        with pytest.raises(KernelError) as error:
            runner.call(op, gemm_shape(attrs, 2, F16), {})
        assert error.value.code == 1


def test_workspace_size_counts_in_64_bits(gpu_runner: KernelRunner) -> None:
    m, k = 1 << 20, 8192
    assert gpu_runner.kernels.workspace_bytes(
        "ABQGemm", gemm_shape(abq(8, k), m, F16, SIMPLE)
    ) == m * 8 + 8 * m * (k // 8)
    assert (
        gpu_runner.kernels.workspace_bytes("QQQGemm", gemm_shape(qqq(8, k), m, F16, SIMPLE))
        == m * 4 + m * k
    )
    for op, attrs in (("ABQGemm", abq(8, k)), ("QQQGemm", qqq(8, k))):
        codes = m * (k + (12 if op == "ABQGemm" else 8))
        assert (
            codes
            < gpu_runner.kernels.workspace_bytes(op, gemm_shape(attrs, m, F16, ANY_TACTIC))
            < codes + (9 << 20)
        )
