"""Runs the token kernels through ctypes and says in numpy what they must write."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugins.core.activation import quantize_activation
from plugins.tools.kernels import DTYPES
from tests.plugins.kernel_cases import F32, assert_same_bits
from tests.plugins.kernel_runner import POISON, KernelError, KernelRunner, Memory

__all__ = [
    "FLOATS",
    "NATURAL",
    "PLANES",
    "SLOTS",
    "Case",
    "Prepared",
    "PrepareShape",
    "check",
    "prepare",
    "rms_norm",
    "slot_order",
]

NATURAL, SLOTS, PLANES, FLOATS = range(4)


class PrepareShape(ctypes.Structure):
    """PrepareShape of plugins/core/host/params.h."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "m",
            "k",
            "group_size",
            "order",
            "unit_words",
            "abits",
            "act_symmetric",
            "dtype",
            "n_counters",
        )
    ] + [("epsilon", ctypes.c_float)]


class PrepareBuffers(ctypes.Structure):
    """PrepareBuffers of plugins/core/host/params.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "x",
            "gamma",
            "residual",
            "residual_out",
            "rows",
            "scale",
            "zero",
            "sums",
            "counters",
        )
    ]


@dataclass(frozen=True)
class Case:
    """One way to prepare tokens."""

    order: int
    k: int
    abits: int = 8
    symmetric: int = 0
    group_size: int = 0
    n_counters: int = 3
    with_sums: bool = True
    epsilon: float = 1e-5

    @property
    def group_len(self) -> int:
        return self.group_size or self.k

    @property
    def group_words(self) -> int:
        return -(-self.group_len // 32)

    @property
    def n_groups(self) -> int:
        return self.k // self.group_len

    @property
    def unit_words(self) -> int:
        if self.n_groups == 1:
            return 4
        return next(words for words in (4, 2, 1) if self.group_words % words == 0)

    @property
    def rows_per_token(self) -> int:
        return next(rows for rows in (2, 4, 8) if rows >= self.abits) if self.order == PLANES else 1

    @property
    def words(self) -> int:
        """32-element words of a row with all padding."""
        multiple = 32 if self.order == PLANES else 4
        return -(-self.n_groups * self.group_words // multiple) * multiple

    def shape(self, m: int, dtype: np.dtype[Any]) -> PrepareShape:
        return PrepareShape(
            m,
            self.k,
            self.group_size,
            self.order,
            self.unit_words,
            self.abits,
            self.symmetric,
            DTYPES[np.dtype(dtype)],
            self.n_counters,
            self.epsilon,
        )


@dataclass(frozen=True)
class Prepared:
    """What a token kernel wrote."""

    rows: np.ndarray  # [m * rows_per_token, bytes of a row], the swizzle undone
    scale: np.ndarray
    zero: np.ndarray
    sums: np.ndarray  # [n_groups, m]
    counters: np.ndarray
    residual_out: np.ndarray


def prepare(
    runner: KernelRunner,
    case: Case,
    x: np.ndarray,
    *,
    offset: int = 0,
    gamma: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> Prepared:
    """Call the kernel on x [m, k] that starts `offset` elements past an aligned address; nothing
    else may be written.

    Raises:
        KernelError: it returned an error code.
    """
    m, shape = len(x), case.shape(len(x), x.dtype)
    function = runner.library.anybit_prepare_rows
    function.restype = ctypes.c_size_t
    n_bytes = int(function(ctypes.byref(shape)))
    moved = np.concatenate([np.zeros(offset, x.dtype), x.ravel()])
    poison = {
        "rows": n_bytes,
        "scale": 4 * m,
        "zero": 4 * m,
        "sums": 4 * m * case.n_groups,
        "counters": 4 * case.n_counters,
    }
    arrays = {
        "x": moved,
        **{name: np.full(size, POISON, np.uint8) for name, size in poison.items()},
    }
    if gamma is not None:
        arrays["gamma"] = gamma
    if residual is not None:
        arrays |= {"residual": residual, "residual_out": np.full(x.nbytes, POISON, np.uint8)}
    memory = {name: Memory(array, runner.kind == "cuda") for name, array in arrays.items()}
    pointers = {name: part.pointer for name, part in memory.items()}
    pointers["x"] += offset * x.itemsize
    if not case.with_sums:
        del pointers["sums"]
    code = runner.library.anybit_prepare_tokens(
        ctypes.byref(shape), ctypes.byref(PrepareBuffers(**pointers)), None
    )
    if code:
        raise KernelError(
            code,
            runner.library.anybit_sim_last_error().decode()
            if runner.kind == "sim"
            else "see cudaError_t",
        )
    for name, part in memory.items():
        part.fetch()
        output = name in poison or name == "residual_out"
        assert not part.changed(guards_only=output), (
            f"wrote {'around' if output else 'into'} {name}"
        )

    def output_of(name: str, dtype: Any) -> np.ndarray:
        return (
            np.frombuffer(memory[name].payload.tobytes(), dtype)
            if name in memory
            else np.empty(0, dtype)
        )

    n_rows = m * case.rows_per_token
    row_count = -(-n_rows // 128) * 128 or 128
    tiles = output_of("rows", np.uint8).reshape(-1, row_count, 8, 16)  # [chunk, row, part, byte]
    rows = np.array([tiles[:, row, np.arange(8) ^ row % 8] for row in range(n_rows)], np.uint8)
    sums = output_of("sums", np.int32).reshape(case.n_groups, m)
    return Prepared(
        rows.reshape(n_rows, len(tiles) * 128),
        output_of("scale", F32),
        output_of("zero", np.int32),
        sums,
        output_of("counters", np.int32),
        output_of("residual_out", x.dtype).reshape(-1, case.k),
    )


def padded(case: Case, values: np.ndarray) -> np.ndarray:
    """values [m, k] with every group padded to whole words and the row to case.words; [m, 32 *
    words].
    """
    grouped = np.zeros((len(values), case.n_groups, 32 * case.group_words), values.dtype)
    grouped[:, :, : case.group_len] = values.reshape(len(values), case.n_groups, case.group_len)
    row = np.zeros((len(values), 32 * case.words), values.dtype)
    row[:, : grouped[0].size] = grouped.reshape(len(values), -1)
    return row


def slot_order(case: Case) -> np.ndarray:
    """The k of every element of an output row, for 1-byte codes and 2-byte values alike, from the
    brief of the GEMM's fragments.

    An int8 step has bytes 4q..4q+3 of either half with bits 2 step + half of the lane; a k16 step
    elements 4 half + 2 q + e.
    """
    words, lanes, row = case.unit_words, 4 // case.unit_words, []
    for unit in range(case.words // words):
        for step in range(words if case.order == SLOTS else 2 * words):
            for half in range(2):
                for q in range(4):
                    first = 32 * (unit * words + q // lanes) + q % lanes * 2 * words
                    if case.order == SLOTS:
                        row += [first + 8 * byte + 2 * step + half for byte in range(4)]
                    else:
                        row += [first + 8 * (2 * half + e) + step for e in range(2)]
    return np.array(row)


def expected_rows(case: Case, values: np.ndarray) -> np.ndarray:
    """Bytes of the rows from codes int8 [m, k] or 16-bit values [m, k]."""
    row = padded(case, values)
    if case.order == NATURAL:
        return row.view(np.uint8)
    if case.order != PLANES:
        return np.ascontiguousarray(row[:, slot_order(case)]).view(np.uint8)
    planes = np.zeros((len(row), case.rows_per_token, row.shape[1]), np.uint8)
    for bit in range(case.abits):
        planes[:, bit] = row.view(np.uint8) >> bit & 1
    return np.packbits(planes, axis=-1, bitorder="little").reshape(-1, row.shape[1] // 8)


def check(
    runner: KernelRunner,
    case: Case,
    x: np.ndarray,
    *,
    order: int = 1,
    y: np.ndarray | None = None,
    **inputs: Any,
) -> Prepared:
    """Prepare x and compare everything with numpy, bit for bit; y: what is quantised if that is not
    x.
    """
    runner.set_order(order)
    got, y = prepare(runner, case, x, **inputs), x if y is None else y
    np.testing.assert_array_equal(got.counters, np.zeros(case.n_counters, np.int32))
    if case.order == FLOATS:
        np.testing.assert_array_equal(got.rows, expected_rows(case, y))  # bytes: NaNs too
        return got
    codes, scale, zero = quantize_activation(y, case.abits, bool(case.symmetric))
    assert_same_bits(got.scale, scale[:, 0])
    np.testing.assert_array_equal(got.zero, zero[:, 0])
    np.testing.assert_array_equal(got.rows, expected_rows(case, codes))
    sums = (
        (codes.astype(np.int32) - zero)
        .reshape(len(x), case.n_groups, case.group_len)
        .sum(-1, dtype=np.int32)
        .T
    )
    poison = np.full(sums.shape, int.from_bytes([POISON] * 4, "little", signed=True), np.int32)
    np.testing.assert_array_equal(got.sums, sums if case.with_sums else poison)
    return got


def rms_norm(
    x: np.ndarray, gamma: np.ndarray, residual: np.ndarray | None, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """v = x + residual rounded to x's type, and RMSNorm(v) * gamma in fp64, not rounded."""
    v = (
        x
        if residual is None
        else (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    )
    wide = v.astype(np.float64)
    inverse_rms = 1 / np.sqrt(
        (wide * wide).mean(-1, keepdims=True) + np.float64(np.float32(epsilon))
    )
    return v, wide * inverse_rms * gamma.astype(np.float64)
