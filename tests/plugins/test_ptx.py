"""Every wrapper of ptx.cuh and ptx_sm90.cuh against numpy, in the simulation and, where there is
one, on a GPU: the two must agree.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import plugins
from plugins.tools.toolkit import find_cuda, find_cuda_include, find_program
from tests.plugins.kernel_runner import Memory, cuda_missing, gpu_sm

SOURCE = Path(__file__).parent / "ptx" / "wrappers.cu"
POISON = 0xCBCBCBCB


class Wrappers:
    """The library of ptx/wrappers.cu."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind, self.library = kind, ctypes.CDLL(str(path))

    def run(self, name: str, words: np.ndarray, outputs: int) -> np.ndarray:
        """Output words [32, outputs] of a kernel for input words [32, inputs]."""
        words = np.ascontiguousarray(words, np.uint32)
        if self.kind == "cuda":
            import torch

            given, out = (
                torch.from_numpy(words.view(np.int32)).cuda(),
                torch.zeros(32, outputs, dtype=torch.int32, device="cuda"),
            )
            pointers = given.data_ptr(), out.data_ptr()
        else:
            # 16-byte aligned, as cp.async wants it
            store = np.zeros(words.size + 4, np.uint32)
            start = -store.ctypes.data // 4 % 4
            self.library.anybit_sim_set_seed(ctypes.c_uint(1))
            given, out = store[start : start + words.size], np.zeros((32, outputs), np.uint32)
            given[:] = words.ravel()
            pointers = given.ctypes.data, out.ctypes.data
        code = self.library.run_wrapper(
            name.encode(), *(ctypes.c_void_p(p) for p in pointers), words.shape[1], outputs
        )
        assert code == 0
        return out.cpu().numpy().view(np.uint32) if self.kind == "cuda" else out

    def products(
        self, unsigned: bool, a: np.ndarray, b: np.ndarray, d: np.ndarray, accumulate: bool
    ) -> np.ndarray:
        """D of run_wgmma [128 threads, tiles, 4] for its arguments in the order of the registers
        and of shared memory.
        """
        arrays = [
            np.ascontiguousarray(a, np.uint32),
            np.ascontiguousarray(b).view(np.uint8),
            np.ascontiguousarray(d, np.int32),
        ]
        if self.kind == "cuda":
            import torch

            kept: list[Any] = [torch.from_numpy(array.view(np.int32)).cuda() for array in arrays]
            pointers = [array.data_ptr() for array in kept]
        else:
            kept = [Memory(array, on_gpu=False) for array in arrays]
            pointers = [memory.pointer for memory in kept]
        code = self.library.run_products(
            int(unsigned), d.shape[1], *(ctypes.c_void_p(p) for p in pointers), int(accumulate)
        )
        assert code == 0
        result = kept[2].cpu().numpy() if self.kind == "cuda" else kept[2].payload.view(np.int32)
        return np.asarray(result.reshape(d.shape))


@pytest.fixture(scope="module", params=["sim", "cuda"])
def wrappers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wrappers:
    if request.param == "cuda" and (reason := cuda_missing()):
        pytest.skip(reason)
    sources, library = (
        Path(plugins.__file__).parent,
        tmp_path_factory.mktemp("ptx") / "libwrappers.so",
    )
    if request.param == "sim":
        flags = json.loads((sources / "build_flags.json").read_text(encoding="utf-8"))["sim"]
        command = [
            find_program("g++", "g++"),
            *flags,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-x",
            "c++",
            "-isystem",
            str(find_cuda_include()),
        ]
    else:
        arch = "90a" if gpu_sm() == 90 else str(gpu_sm())
        command = [
            str(find_cuda().nvcc),
            "-std=c++17",
            "-Xcompiler=-fPIC",
            f"-arch=sm_{arch}",
            f"-I{find_cuda().include}",
        ]
    subprocess.run(
        [*command, "-shared", f"-I{sources}", str(SOURCE), "-o", str(library)], check=True
    )
    return Wrappers(request.param, library)


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, (32, count), dtype=np.uint32)


def matrices(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A [16, 32 bytes] and B [8 columns, 32 bytes] of the lanes' registers a[0..3], b[0..1]."""
    a, b = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32)
    for lane, word in enumerate(words):
        g, q = divmod(lane, 4)
        a[g, q], a[g + 8, q], a[g, q + 4], a[g + 8, q + 4] = word[:4]
        b[g, q], b[g, q + 4] = word[4:6]
    return a.view(np.uint8), b.view(np.uint8)


def accumulators(c: np.ndarray) -> np.ndarray:
    """The lanes' registers c[0..3] of C [16, 8]."""
    lanes = np.arange(32)
    g, q = lanes // 4, lanes % 4
    return np.stack([c[g, 2 * q], c[g, 2 * q + 1], c[g + 8, 2 * q], c[g + 8, 2 * q + 1]], 1)


@pytest.mark.parametrize(("name", "a_type"), [("mma_u8_s8", np.uint8), ("mma_s8_s8", np.int8)])
def test_integer_mma(wrappers: Wrappers, name: str, a_type: type) -> None:
    words = random_words(10)
    a, b = matrices(words)
    product = a.view(a_type).astype(np.int64) @ b.view(np.int8).astype(np.int64).T
    want = (accumulators(product) + words[:, 6:].view(np.int32)).astype(np.int32)
    np.testing.assert_array_equal(wrappers.run(name, words, 4).view(np.int32), want)


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize(("unsigned", "tiles"), [(True, 8), (True, 16), (False, 8), (False, 16)])
def test_wgmma(wrappers: Wrappers, unsigned: bool, tiles: int, order: int) -> None:
    """Registers of A and D by warp, B through a bulk copy in the 128-byte swizzle, barriers; with
    and without the old D.
    """
    if wrappers.kind == "cuda":
        if gpu_sm() != 90 or order:
            pytest.skip(
                "only compute capability 9.0 has wgmma; the order of threads is the GPU's own"
            )
    else:
        wrappers.library.anybit_sim_set_seed(ctypes.c_uint(order))
    rng = np.random.default_rng(order)
    a, b = (
        rng.integers(0, 256, (64, 128), np.uint8),
        rng.integers(0, 256, (8 * tiles, 128), np.uint8),
    )
    start = rng.integers(-1000, 1000, (128, tiles, 4))
    threads, steps = np.arange(128), np.arange(4)
    rows = 16 * (threads // 32) + threads % 32 // 4
    words = a.view(np.uint32)  # [64, 32]: 8 words for each step
    word = 8 * steps[None, :] + threads[:, None] % 4
    fragments = np.stack(
        [words[rows[:, None] + 8 * (i % 2), word + 4 * (i // 2)] for i in range(4)], -1
    )
    parts = b.reshape(-1, 8, 16)
    swizzled = np.stack([part[np.arange(8) ^ row % 8] for row, part in enumerate(parts)])
    product = (
        a.view(np.uint8 if unsigned else np.int8).astype(np.int64)
        @ b.view(np.int8).astype(np.int64).T
    )
    column = 8 * np.arange(tiles)[None, :] + 2 * (threads[:, None] % 4)
    want = np.stack([product[rows[:, None] + 8 * (i // 2), column + i % 2] for i in range(4)], -1)
    for accumulate in (False, True):
        got = wrappers.products(unsigned, fragments, swizzled, start, accumulate)
        np.testing.assert_array_equal(got, want + (start if accumulate else 0))


def test_binary_mma(wrappers: Wrappers) -> None:
    words = random_words(10)
    a, b = (np.unpackbits(part, axis=1).astype(np.int64) for part in matrices(words))
    want = (accumulators(a @ b.T) + words[:, 6:].view(np.int32)).astype(np.int32)
    np.testing.assert_array_equal(wrappers.run("mma_b1", words, 4).view(np.int32), want)


@pytest.mark.parametrize(
    ("name", "dtype"), [("mma_fp16", np.float16), ("mma_bf16", ml_dtypes.bfloat16)]
)
def test_float_mma(wrappers: Wrappers, name: str, dtype: type) -> None:
    rng = np.random.default_rng(1)
    pairs, sums = (
        rng.normal(0, 1, (32, 12)).astype(dtype),
        rng.normal(0, 1, (32, 4)).astype(np.float32),
    )
    words = np.concatenate([pairs.view(np.uint32), sums.view(np.uint32)], 1)
    a, b = (part.view(dtype).astype(np.float64) for part in matrices(words))
    want = accumulators(a @ b.T) + words[:, 6:].view(np.float32)
    np.testing.assert_allclose(
        wrappers.run(name, words, 4).view(np.float32), want, rtol=1e-5, atol=1e-5
    )


def test_load_matrices(wrappers: Wrappers) -> None:
    words = random_words(4)
    rows = words.reshape(4, 8, 4)  # matrix, row, word
    lanes = np.arange(32)
    want = np.stack([rows[i, lanes // 4, lanes % 4] for i in range(4)], 1)
    np.testing.assert_array_equal(wrappers.run("load_matrices", words, 4), want)


def test_asynchronous_copies(wrappers: Wrappers) -> None:
    words = random_words(12)
    want = np.concatenate([words[:, :4], np.zeros((32, 4), np.uint32), words[:, 8:9]], 1)
    np.testing.assert_array_equal(wrappers.run("copies", words, 9), want)


def test_a_missing_wait_shows_in_the_simulation(wrappers: Wrappers) -> None:
    if wrappers.kind == "cuda":
        pytest.skip("a GPU may be fast enough")
    assert (wrappers.run("copy_without_wait", random_words(4), 1) == POISON).all()


def test_lanes(wrappers: Wrappers) -> None:
    words, lanes = random_words(2), np.arange(32)
    odd = int(((words[:, 1] & 1).astype(np.uint64) << lanes.astype(np.uint64)).sum())
    want = np.stack(
        [words[lanes ^ 5, 0] & 0x3FFFFFFF, words[lanes ^ 16, 1], np.full(32, odd, np.uint32)], 1
    )
    np.testing.assert_array_equal(wrappers.run("lanes", words, 3), want)


def test_pairs_of_16_bit_numbers(wrappers: Wrappers) -> None:
    """One rounding, half to even, also where a product and a sum would round twice; limits; bytes."""
    rng = np.random.default_rng(2)
    codes, scales = rng.integers(-8, 8, (32, 2)), rng.uniform(-16, 16, (32, 2))
    half = codes.astype(np.float16), scales.astype(np.float16), np.full((32, 2), 1536, np.float16)
    low, high = np.full((32, 2), -3, np.float16), np.full((32, 2), 4, np.float16)
    bf = [rng.integers(-100, 100, (32, 2)).astype(ml_dtypes.bfloat16) for _ in range(3)]
    numbers = [part.view(np.uint32) for part in (*half, low, high, *bf)]
    words = np.concatenate([*numbers, random_words(2)], 1)
    got = wrappers.run("pairs", words, 5)
    fused = (half[0].astype(np.float64) * half[1].astype(np.float64) + 1536).astype(np.float16)
    np.testing.assert_array_equal(got[:, :1].view(np.float16), fused)
    np.testing.assert_array_equal(got[:, 1:2].view(np.float16), np.clip(half[0], -3, 4))
    wide = [part.astype(np.float64) for part in bf]
    np.testing.assert_array_equal(
        got[:, 2:3].view(ml_dtypes.bfloat16),
        (wide[0] * wide[1] + wide[2]).astype(ml_dtypes.bfloat16),
    )
    a, b = (words[:, 8 + i : 9 + i].view(np.uint8) for i in range(2))
    np.testing.assert_array_equal(
        got[:, 3:4].view(np.uint8), np.concatenate([a[:, ::2], b[:, ::2]], 1)
    )
    dot = (a.view(np.int8).astype(np.int64) * b.view(np.int8)).sum(1) + 7
    np.testing.assert_array_equal(got[:, 4].view(np.int32), dot)


def test_min_and_max_in_which_nan_wins(wrappers: Wrappers) -> None:
    rng = np.random.default_rng(3)
    special = np.array([np.nan, np.inf, -np.inf, 1e-7, 1.0], np.float32)
    columns, want = [], []
    for dtype, per_word in ((np.float32, 1), (np.float16, 2), (ml_dtypes.bfloat16, 2)):
        a, b = (
            np.where(
                rng.random((32, per_word)) < 0.4,
                rng.choice(special, (32, per_word)),
                rng.normal(0, 1, (32, per_word)),
            ).astype(dtype)
            for _ in range(2)
        )
        columns += [a.view(np.uint32), b.view(np.uint32)]
        want += [
            pick(a.astype(np.float32), b.astype(np.float32)) for pick in (np.minimum, np.maximum)
        ]
    got = wrappers.run("extremes", np.concatenate(columns, 1), 6)
    for column, expected in enumerate(want):
        dtype = (np.float32, np.float16, ml_dtypes.bfloat16)[column // 2]
        np.testing.assert_array_equal(
            got[:, column : column + 1].copy().view(dtype).astype(np.float32), expected
        )
