"""Every kernel that an op lists for a shape against numpy, whatever the library would choose, and
the choice itself.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plugins import op_spec
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.tools.kernels import KERNEL_STEP, SIMPLE
from tests.plugins.kernel_cases import (
    BF16,
    F16,
    F32,
    LEVELS,
    abq,
    abq_arrays,
    assert_close,
    op_of,
    qqq,
    qqq_arrays,
    tokens,
)
from tests.plugins.kernel_runner import KernelError, KernelRunner, gpu_sm

INT8 = {"int8 64x8", "int8 64x16", "int8 128x32", "int8 128x64", "int8 256x64"}
pytestmark = pytest.mark.slow  # a minute as a whole

WGMMA = {"wgmma 128x64", "wgmma 128x128", "wgmma 256x128"}
MANY, FEW = 132, 1  # multiprocessors: K is split among many blocks, or not at all


@pytest.fixture(scope="module")
def runner(gpu_runner: KernelRunner) -> KernelRunner:
    """These are tests of the CUDA kernels alone."""
    return gpu_runner


def has_wgmma(runner: KernelRunner) -> bool:
    """Whether check() runs the kernels for compute capability 9.0."""
    return runner.kind == "sim" or gpu_sm() == 90


def check(
    runner: KernelRunner,
    attrs: GemmAttributes,
    x: np.ndarray,
    *,
    arrays: QuantArrays | None = None,
    order: int = 1,
    gpus: tuple[int, ...] = (FEW, MANY),
) -> set[str]:
    """Run every tactic on an undivided and on a divided K; returns the kernels' names."""
    arrays = arrays or (
        qqq_arrays(attrs)
        if (attrs.wbits, attrs.act_symmetric, attrs.levels) == (4, 1, 16)
        else abq_arrays(attrs)
    )
    spec, names = op_spec(op_of(arrays)), set()
    tensors = spec.pack(arrays, attrs, "test")
    want = spec.reference(x, tensors, attrs)
    runner.set_order(order)
    for multiprocessors in gpus:
        runner.set_device(90, multiprocessors)
        for tactic, name in runner.tactics(spec.name, attrs, len(x), x.dtype).items():
            y = runner.gemm(spec.name, attrs, x, tensors, tactic=tactic)
            reordered = spec.name == "ABQGemm" and attrs.n_groups > 1 and tactic % KERNEL_STEP > 1
            try:
                assert_close(y, want, attrs, arrays, x, reordered)
            except AssertionError as error:
                raise AssertionError(
                    f"{spec.name} {name}, {tactic % KERNEL_STEP} shares, {attrs}, {len(x)} "
                    f"tokens: {error}"
                ) from None
            names.add(name)
    return names


@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_abq_bit_widths(runner: KernelRunner, w: tuple[int, int]) -> None:
    for number, (abits, m) in enumerate(((2, 9), (3, 1), (4, 4), (5, 2), (8, 3), (8, 17)), w[0]):
        attrs, x = abq(66, 640, w=w, a=abits, sym=abits % 2), tokens(m, 640, F16)
        gpus = (FEW, MANY)[number % 2 :][:1]  # each pair of bit widths once, K whole or divided
        names = check(runner, attrs, x, arrays=abq_arrays(attrs), order=abits, gpus=gpus)
        assert names == {
            "simple",
            "b1 64x8",
            "b1 64x16",
            *INT8,
            *(WGMMA if has_wgmma(runner) else ()),
        }


@pytest.mark.parametrize("g", [32, 40, 64, 96, 128, 192, 256, 512, 33])
def test_abq_groups(runner: KernelRunner, g: int) -> None:
    for w, sym, groups in (((2, 5), 0, 5), ((4, 16), 1, 4), ((8, 256), 0, 2)):
        attrs = abq(33, g * groups, w=w, sym=sym, g=g, bias=1)
        names = check(runner, attrs, tokens(9, g * groups, F16), arrays=abq_arrays(attrs), order=g)
        whole_chunks = has_wgmma(runner) and -(-g // 32) % 4 == 0
        assert names & WGMMA == (WGMMA - {"wgmma 256x128"} if whole_chunks else set())


@pytest.mark.parametrize("g", [0, 16, 32, 64, 128])
def test_abq_minimums(runner: KernelRunner, g: int) -> None:
    names = set()
    for w, a, sym, m in (((4, 16), 8, 0, 9), ((2, 4), 3, 1, 1), ((6, 64), 16, 0, 3)):
        attrs = abq(67, 512, w=w, a=a, sym=sym, g=g, bias=1, minimum=1)
        names |= check(runner, attrs, tokens(m, 512, F16), arrays=abq_arrays(attrs), order=g)
    wanted = {"simple", *INT8, "a16 64x8", "a16 64x16", "a16 128x32"}
    if g == 0:
        wanted |= {"b1 64x8", "b1 64x16", "a16 128x64"}
    if has_wgmma(runner) and g % 128 == 0:
        wanted |= WGMMA - ({"wgmma 256x128"} if g else set())
    assert names >= wanted - ({"int8 256x64"} if g else set())


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("w", LEVELS, ids=lambda w: f"w{w[0]}l{w[1]}")
def test_abq_weight_only(runner: KernelRunner, w: tuple[int, int], dtype: np.dtype[Any]) -> None:
    for k, g, m in (
        (1, 0, 2),
        (129, 0, 9),
        (640, 0, 1),
        (160, 32, 3),
        (192, 96, 2),
        (640, 128, 17),
        (99, 33, 1),
    ):
        attrs = abq(67, k, w=w, a=16, g=g, bias=1)
        names = check(runner, attrs, tokens(m, k, dtype), arrays=abq_arrays(attrs), order=k)
        assert names == {"simple", "a16 64x8", "a16 64x16", "a16 128x32"} | (
            set() if g else {"a16 128x64"}
        )


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_weight_only_zero_points_far_and_near(runner: KernelRunner, dtype: np.dtype[Any]) -> None:
    """At the borders of what 16-bit numbers hold exactly, and anywhere in int32."""
    borders = [
        -1025,
        -1024,
        1024,
        1025,
        -129,
        -128,
        128,
        129,
        -1,
        0,
        256,
        257,
        10**6,
        -(2**31),
        2**31 - 1,
    ]
    for w, g in itertools.product(((4, 16), (8, 256)), (0, 64)):
        attrs = abq(40, 256, w=w, a=16, g=g)
        arrays = abq_arrays(attrs)
        zero = np.resize(np.array(borders, np.int32), arrays.scale.shape)
        check(runner, attrs, tokens(3, 256, dtype), arrays=replace(arrays, zero=zero))
        check(
            runner,
            attrs,
            tokens(3, 256, dtype),
            arrays=replace(arrays, zero=np.full_like(zero, borders[g % 7])),
        )


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 17, 63, 64, 65])
def test_tokens_around_tiles(runner: KernelRunner, m: int) -> None:
    for n, k in ((63, 130), (257, 129)):
        check(runner, abq(n, k, w=(3, 8), sym=0), tokens(m, k, F16), order=m)
        check(runner, qqq(n, k), tokens(m, k, F16), order=m)
    check(runner, qqq(65, 192, g=64), tokens(m, 192, F16), order=m)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 127, 128, 129, 511, 513, 1024, 1040])
def test_lengths_around_chunks_and_slots(runner: KernelRunner, k: int) -> None:
    for n in (1, 64):
        check(runner, abq(n, k, w=(2, 4)), tokens(2, k, F16), order=k)
        check(runner, qqq(n, k), tokens(2, k, F16), order=k)


@pytest.mark.parametrize(("k", "g"), [(64, 64), (320, 64), (128, 128), (1152, 128)])
def test_qqq_groups(runner: KernelRunner, k: int, g: int) -> None:
    """Scales that need the limit of +-127, on one row of a tile only as well, negative ones, and
    one that overflows fp16.
    """
    attrs = qqq(130, k, g=g, bias=1)
    arrays = qqq_arrays(attrs)
    assert arrays.scale_group is not None
    scale_group = arrays.scale_group.copy()
    scale_group[::2] = np.minimum(np.abs(scale_group[::2]), 15.875)
    scale_group[3] = 60000
    scale_group[4] = -0.0001
    check(
        runner, attrs, tokens(10, k, F16), arrays=replace(arrays, scale_group=scale_group), order=g
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_dtypes_and_bias(runner: KernelRunner, dtype: np.dtype[Any]) -> None:
    for bias in (0, 1):
        for attrs in (
            abq(70, 256, bias=bias),
            abq(70, 256, g=64, bias=bias),
            qqq(70, 256, bias=bias),
            qqq(70, 256, g=128, bias=bias),
        ):
            check(runner, attrs, tokens(3, 256, dtype))


@pytest.mark.parametrize("order", range(6))
def test_any_thread_order(runner: KernelRunner, order: int) -> None:
    for attrs in (abq(70, 1100), abq(70, 1024, g=128), qqq(70, 1100), qqq(70, 1152, g=64)):
        check(runner, attrs, tokens(10, attrs.in_features, F16), order=order)


def test_rows_with_nan_or_inf_are_nan_and_only_those(runner: KernelRunner) -> None:
    for attrs, bad in itertools.product(
        (abq(70, 256), abq(70, 256, g=64), qqq(70, 256)), (np.nan, np.inf)
    ):
        x = tokens(9, 256, F16)
        x[1, 0] = x[8, 255] = bad
        x[2] = 0
        check(runner, attrs, x)


def test_zero_points_far_outside_the_code_range(runner: KernelRunner) -> None:
    for g in (0, 64):
        attrs = abq(40, 128, g=g)
        arrays = abq_arrays(attrs)
        zero = np.resize(
            np.array([-(2**31), 2**31 - 1, -10_000, 10_000, -1, 16, 65_000, -65_500], np.int32),
            arrays.scale.shape,
        )
        check(runner, attrs, tokens(3, 128, F32), arrays=replace(arrays, zero=zero))


def test_largest_sums(runner: KernelRunner) -> None:
    """The longest rows whose sums the fast kernels can hold, every code at its limit; one element
    more is left to the simple kernel.
    """
    one = np.ones((2, 1), np.float32)
    for k, kernels in (
        (32_896, {"simple", "int8 64x8", "int8 64x16", "int8 128x64", "int8 256x64"}),
        (32_897, {"simple"}),
    ):
        attrs = abq(2, k, w=(8, 256))
        codes = np.stack([np.full(k, 255, np.uint8), np.zeros(k, np.uint8)])
        x = np.concatenate([np.full((1, k), -3.0), np.full((1, k), 7.0)]).astype(F32)
        assert kernels <= check(
            runner,
            attrs,
            x,
            arrays=QuantArrays(codes, one, np.array([[0], [255]], np.int32)),
            gpus=(FEW,),
        )
    for k, g in ((132_104, 0), (132_105, 0), (133_120, 128)):
        attrs = qqq(2, k, g=g)
        codes = np.stack([np.full(k, 7, np.int8), np.full(k, -8, np.int8)])
        x = np.concatenate([np.full((1, k), -3.0), np.full((1, k), 7.0)]).astype(F32)
        group = np.full((2, k // 128), 30, np.float16) if g else None
        names = check(
            runner, attrs, x, arrays=QuantArrays(codes, one, scale_group=group), gpus=(FEW,)
        )
        assert (names == {"simple"}) == (k == 132_105)


@pytest.mark.parametrize("scratch", [0x00, 0x7F, 0xFF])
def test_workspace_needs_no_clearing(runner: KernelRunner, scratch: int) -> None:
    runner.set_device(90, MANY)
    for attrs, arrays in (
        (abq(70, 1100), abq_arrays(abq(70, 1100))),
        (qqq(70, 1100), qqq_arrays(qqq(70, 1100))),
    ):
        spec, x = op_spec(op_of(arrays)), tokens(3, 1100, F16)
        tensors = spec.pack(arrays, attrs, "test")
        y = runner.gemm(spec.name, attrs, x, tensors, scratch=scratch)
        assert_close(y, spec.reference(x, tensors, attrs), attrs, arrays, x)


@pytest.mark.parametrize("op", ["ABQGemm", "QQQGemm"])
@pytest.mark.parametrize("sm", [80, 89, 90, 120])
def test_choice_of_kernel(runner: KernelRunner, op: str, sm: int) -> None:
    """The smallest tile that holds the tokens comes first; tiles are split among multiprocessors
    only where those would idle.

    On 9.0 and nowhere else many tokens take the wgmma tile that needs the fewest waves.
    """
    if runner.kind == "cuda" and sm != gpu_sm():
        pytest.skip("the GPU is what it is")
    attrs = abq(4096, 4096) if op == "ABQGemm" else qqq(4096, 4096)
    runner.set_device(sm, MANY, 99 << 10 if sm in (89, 120) else 227 << 10)

    def chosen(m: int) -> tuple[str, int]:
        """Family and tile of the chosen kernel and shares of K."""
        tactic, name = next(iter(runner.tactics(op, attrs, m, F16).items()))
        return name, tactic % KERNEL_STEP

    def tokens_of(m: int) -> int:
        return int(chosen(m)[0].split("x")[-1])

    assert [tokens_of(m) for m in (8, 9, 16, 17, 33, 64)] == [8, 16, 16, 32, 64, 64]
    assert [tokens_of(0), len(runner.tactics(op, attrs, 0, F16)) > 1] == [8, True]
    assert chosen(1)[1] > 1
    many = {m: chosen(m) for m in (33, 64, 512, 4096)}
    if sm != 90:
        assert not [
            name for name in runner.tactics(op, attrs, 4096, F16).values() if "wgmma" in name
        ]
        assert many[4096] == ("int8 256x64", 1)
    else:
        tiles = (
            ("128x64", "128x64", "128x128", "256x128")
            if op == "ABQGemm"
            else ("256x64", "256x64", "256x64", "256x128")
        )
        assert [name for name, _ in many.values()] == [f"wgmma {tile}" for tile in tiles]


def test_small_shared_memory_leaves_what_fits(runner: KernelRunner) -> None:
    if runner.kind == "cuda":
        pytest.skip("the GPU is what it is")
    runner.set_device(75, 40, 64 << 10)
    assert set(runner.tactics("QQQGemm", qqq(256, 512), 100, F16).values()) == {"simple"}
    runner.set_device(86, 40, 99 << 10)
    everything = {"simple", "int8 64x8", "int8 64x16", "int8 64x32", "int8 64x64", "int8 256x64"}
    assert set(runner.tactics("QQQGemm", qqq(256, 512), 100, F16).values()) == everything
    runner.set_device(80, 40, 72 << 10)
    assert set(runner.tactics("QQQGemm", qqq(256, 512), 100, F16).values()) == {
        "simple",
        "int8 64x8",
        "int8 64x16",
        "int8 64x64",
    }


@pytest.mark.parametrize("tactic", [1, 63, 64, SIMPLE + 200 * KERNEL_STEP, -2])
def test_unknown_tactics_are_refused(runner: KernelRunner, tactic: int) -> None:
    attrs = qqq(8, 64)
    tensors = op_spec("QQQGemm").pack(qqq_arrays(attrs), attrs, "test")
    with pytest.raises(KernelError) as error:
        runner.gemm("QQQGemm", attrs, tokens(1, 64, F16), tensors, tactic=tactic)
    assert error.value.code == 1
