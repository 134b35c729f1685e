"""What the native kernels of a CPU have of their own: kernels for a few tokens, panels for many,
blocks and slabs of tokens, and groups that some of them leave to others.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plugins import op_spec
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.tools.build import build_onnxruntime
from plugins.tools.kernels import gemm_shape
from tests.plugins.kernel_cases import (
    BF16,
    F16,
    F32,
    LEVELS,
    abq,
    abq_arrays,
    assert_close,
    assert_same_bits,
    op_of,
    qqq,
    qqq_arrays,
    tokens,
)
from tests.plugins.kernel_runner import (
    CPU_KINDS,
    INSTRUCTION_SETS,
    KernelRunner,
    cpu_missing,
    cpu_tactic,
)


@pytest.fixture(scope="module", params=CPU_KINDS)
def runner(request: pytest.FixtureRequest) -> KernelRunner:
    """The kernels of one instruction set."""
    kind, _, isa = request.param.partition("-")
    if reason := cpu_missing(isa, kind == "emulated"):
        pytest.skip(reason)
    return KernelRunner(request.param)


def check(runner: KernelRunner, attrs: GemmAttributes, arrays: QuantArrays, x: np.ndarray) -> None:
    spec = op_spec(op_of(arrays))
    tensors = spec.pack(arrays, attrs, "test")
    y = runner.gemm(spec.name, attrs, x, tensors)
    assert_close(y, spec.reference(x, tensors, attrs), attrs, arrays, x)


@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_few_and_some_tokens_of_every_bit_width(runner: KernelRunner, w: tuple[int, int]) -> None:
    """Rows of more than one span of 512 codes, and a panel that is not full."""
    for m, sym, g in itertools.product((1, 2, 3, 4, 7, 12, 14), (0, 1), (0, 128)):
        attrs = abq(37, 1152, w=w, a=8, sym=sym, g=g, bias=m % 2)
        check(runner, attrs, abq_arrays(attrs), tokens(m, 1152, F16))


@pytest.mark.parametrize("m", [1, 4, 6])
@pytest.mark.parametrize(
    ("k", "g"),
    [
        *((1280, 64), (1344, 64), (1280, 256), (1152, 384), (1120, 112), (1280, 32), (900, 60)),
        *((1024, 64), (1024, 128), (1536, 256)),  # whole spans
    ],
)
def test_groups_of_lanes_halves_and_others(runner: KernelRunner, k: int, g: int, m: int) -> None:
    for w, sym in (((2, 4), 0), ((2, 4), 1), ((3, 8), 1), ((8, 256), 0)):
        attrs = abq(35, k, w=w, sym=sym, g=g)
        check(runner, attrs, abq_arrays(attrs), tokens(m, k, F32))


@pytest.mark.parametrize("m", [1, 4, 14])
@pytest.mark.parametrize(("k", "g"), [(1152, 0), (1280, 64), (1280, 32), (1280, 16), (1152, 128)])
def test_minimums_of_few_and_many_tokens(runner: KernelRunner, k: int, g: int, m: int) -> None:
    for w, a, sym in (((4, 16), 8, 0), ((5, 32), 8, 1), ((8, 256), 4, 0), ((4, 16), 16, 0)):
        attrs = abq(35, k, w=w, a=a, sym=sym, g=g, minimum=1)
        check(runner, attrs, abq_arrays(attrs), tokens(m, k, F16))


@pytest.mark.parametrize(
    ("groups", "m", "sym", "a"),
    [
        (204, 5, 1, 8),
        (224, 6, 1, 8),
        (210, 5, 0, 8),
        (260, 5, 1, 8),
        (400, 2, 0, 8),
        (340, 2, 1, 16),
    ],
)
def test_more_groups_than_the_stack_has_room_for(
    runner: KernelRunner, groups: int, m: int, sym: int, a: int
) -> None:
    """1024 sums: of five tokens, then of four, and of more than there is room for."""
    attrs = abq(3, 64 * groups, w=(2, 4), a=a, sym=sym, g=64)
    check(runner, attrs, abq_arrays(attrs), tokens(m, 64 * groups, F16))


@pytest.mark.parametrize("k", [480, 512, 527, 1040])
@pytest.mark.parametrize("g", [0, 64])
def test_qqq_rows_in_fours_and_what_is_left(runner: KernelRunner, k: int, g: int) -> None:
    k = k // 64 * 64 if g else k
    for n, m in (
        (64, 1),
        (65, 2),
        (191, 3),
        (2200, 4),
        (4200, 1),
        (130, 5),
        (96, 6),
        (129, 7),
        (1100, 8),
        (70, 9),
    ):
        attrs = qqq(n, k, g=g, bias=n % 2)
        check(runner, attrs, qqq_arrays(attrs), tokens(m, k, F16))


@pytest.mark.parametrize("m", [12, 13, 96, 97, 193, 511, 513, 600])
def test_blocks_and_slabs_of_tokens(runner: KernelRunner, m: int) -> None:
    cases = [abq(33, 96, sym=m % 2), abq(33, 96, a=16, g=48), abq(33, 96, g=32), qqq(70, 128, g=64)]
    for attrs in [*cases, qqq(70, 100), replace(qqq(70, 100), norm_epsilon=1e-5)]:
        arrays = (
            qqq_arrays(attrs)
            if attrs.wbits == 4 and attrs.out_features == 70
            else abq_arrays(attrs)
        )
        spec, x = op_spec(op_of(arrays)), tokens(m, attrs.in_features, F16)
        tensors = spec.pack(arrays, attrs, "test")
        if attrs.has_norm:
            tensors["gamma"] = tokens(1, attrs.in_features, F16, seed=1)[0]
        y = runner.gemm(spec.name, attrs, x, tensors)
        assert_close(y, spec.reference(x, tensors, attrs), attrs, arrays, x)


@pytest.mark.parametrize(
    ("arrays_of", "attrs"),
    [
        (abq_arrays, abq(70, 1152)),
        (abq_arrays, abq(70, 1152, w=(2, 4), g=64, bias=1)),
        (abq_arrays, replace(abq(70, 1152, w=(8, 256), g=128, sym=1), norm_epsilon=1e-5)),
        (abq_arrays, abq(70, 1152, a=16, g=64)),
        (abq_arrays, abq(70, 1152, g=32, minimum=1)),
        (abq_arrays, replace(abq(70, 1152, a=16, bias=1), norm_epsilon=1e-5)),
        (qqq_arrays, qqq(70, 1152, bias=1)),
        (qqq_arrays, replace(qqq(70, 1152, g=64), norm_epsilon=1e-5)),
    ],
)
def test_a_token_is_the_same_to_the_bit_whatever_else_a_call_computes(
    runner: KernelRunner,
    arrays_of: Callable[[GemmAttributes], QuantArrays],
    attrs: GemmAttributes,
) -> None:
    """In kernels for few tokens and for many, in blocks and slabs."""
    arrays = arrays_of(attrs)
    spec, x = op_spec(op_of(arrays)), tokens(530, attrs.in_features, F32)
    tensors = spec.pack(arrays, attrs, "test")
    if attrs.has_norm:
        tensors["gamma"] = tokens(1, attrs.in_features, F32, seed=1)[0]
    whole, first = runner.gemm(spec.name, attrs, x, tensors), 0
    for count in (1, 1, 2, 3, 4, 5, 9, 13, 97, 395):
        part = slice(first, first + count)
        assert_same_bits(runner.gemm(spec.name, attrs, x[part], tensors), whole[part])
        first += count


@pytest.mark.parametrize("m", [2, 18])
def test_long_sums(runner: KernelRunner, m: int) -> None:
    """Fields of codes that are not shifted down, and weights with their offset, near their limits, of
    few tokens and of more.
    """
    k = 131_072
    for bits in (1, 2, 4):
        attrs = abq(2, k, w=(bits, 1 << bits), sym=0)
        codes = np.stack([np.full(k, (1 << bits) - 1, np.uint8), np.zeros(k, np.uint8)])
        one = np.ones((2, 1), np.float32)
        x = np.tile(np.array([[-3.0], [7.0]], F32), (m // 2, k))
        check(runner, attrs, QuantArrays(codes, one, np.array([[0], [1]], np.int32)), x)
    attrs = qqq(2, k)
    codes = np.stack([np.full(k, 7, np.int8), np.full(k, -8, np.int8)])
    check(runner, attrs, QuantArrays(codes, one), x)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_every_number_of_the_type_is_read_and_written(
    runner: KernelRunner, dtype: np.dtype[Any]
) -> None:
    """A weight-only product with one weight of 1 gives X back: all 16-bit numbers, subnormal ones
    too, and as many of 32 bits.
    """
    patterns = np.arange(1 << 16, dtype=np.uint16 if dtype != F32 else np.uint32)
    x = (patterns if dtype != F32 else patterns * np.uint32(65_537)).view(dtype)[:, None]
    attrs = abq(1, 1, a=16)
    one = np.ones((1, 1), np.float32)
    arrays = QuantArrays(np.full((1, 1), 2, np.uint8), one, np.ones((1, 1), np.int32))
    tensors = op_spec("ABQGemm").pack(arrays, attrs, "test")
    y = runner.gemm("ABQGemm", attrs, x, tensors).astype(np.float32)
    want = op_spec("ABQGemm").reference(x, tensors, attrs).astype(np.float32)
    np.testing.assert_array_equal(y, want)


def test_tactics_are_instruction_sets(runner: KernelRunner) -> None:
    listed = runner.kernels.tactics("QQQGemm", gemm_shape(qqq(64, 64), 1, F16))
    assert listed[cpu_tactic(runner.isa)] == runner.isa
    assert list(listed.values()) == [
        name for name in reversed(INSTRUCTION_SETS) if name in listed.values()
    ]
    with pytest.raises(RuntimeError, match="error 1"):
        runner.call("QQQGemm", gemm_shape(qqq(64, 64), 1, F16, tactic=7), {"x": 1})


def test_the_library_shows_its_own_functions_only() -> None:
    """No inline function of a header that was compiled for a wide instruction set is seen outside."""
    library = build_onnxruntime()
    ctypes.CDLL(str(library))
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert sorted(line.split()[-1] for line in shown if line) == [
        "RegisterCustomOps",
        "anybit_activation",
        "anybit_attention",
        "anybit_kernels_made",
        "anybit_ops",
        "anybit_residual_sum",
        "anybit_rms_norm",
        "anybit_rotated_heads",
    ]


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("minimum", [0, 1])
def test_one_huge_element_of_a_weight_only_token(
    runner: KernelRunner, dtype: np.dtype[Any], minimum: int
) -> None:
    """Where its weight is 0 the others make the sum, and they have lost nothing to it."""
    attrs = abq(40, 256, a=16, g=64, bias=1, minimum=minimum)
    arrays = abq_arrays(attrs)
    arrays.codes[::2, 70] = 7
    if arrays.zero is not None:
        arrays.zero[::2, 1] = 7
    if arrays.minimum is not None:
        arrays.minimum[::2, 1] = -7 * arrays.scale[::2, 1]
    for m in (1, 4, 7, 40):
        x = np.random.default_rng(m).normal(0, 1, (m, 256)).astype(dtype)
        x[::2, 70] = {F16: 6e4, BF16: 1e30, F32: 1e30}[dtype]
        check(runner, attrs, arrays, x)


@pytest.mark.parametrize("g", [0, 48])
def test_weight_only_tokens_of_zeros_and_not_finite_ones(runner: KernelRunner, g: int) -> None:
    """A bad token is its own row's affair, whatever tokens it shares a tile with."""
    for dtype, minimum, m in itertools.product((F16, BF16, F32), (0, 1), (3, 9, 40)):
        attrs = abq(33, 192, a=16, g=g, bias=1, minimum=minimum)
        arrays, x = abq_arrays(attrs), tokens(m, 192, dtype)
        want = runner.gemm("ABQGemm", attrs, x, op_spec("ABQGemm").pack(arrays, attrs, "test"))
        bad = x.copy()
        bad[0], bad[1, 5], bad[2, 7] = 0, np.nan, np.inf
        got = runner.gemm("ABQGemm", attrs, bad, op_spec("ABQGemm").pack(arrays, attrs, "test"))
        assert arrays.bias is not None
        assert_same_bits(got[:1], arrays.bias.astype(dtype)[None])
        assert np.isnan(got[1].astype(np.float32)).all()
        assert not (np.abs(got[2].astype(np.float32)) < 1e4).any()  # NaN, infinite or the largest
        assert_same_bits(got[3:], want[3:])
