"""Calls the native kernel of attention with its cache, in guarded memory, and computes the same in
numpy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from plugins.cached_attention.codes import stored, stored_values
from plugins.tools.build import build_onnxruntime
from plugins.tools.kernels import DTYPES
from tests.plugins.kernel_cases import BF16, F16, F32
from tests.plugins.kernel_runner import INSTRUCTION_SETS, Memory

__all__ = [
    "Case",
    "attend",
    "chunk_of",
    "error",
    "make_case",
    "parallel_of",
    "reference",
    "same_bits",
    "tolerance",
]


class Shape(ctypes.Structure):
    """AttentionShape of plugins/cached_attention/cpu/attention.h."""

    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "batch",
                "heads",
                "kv_heads",
                "head_dim",
                "tokens",
                "past",
                "static_cache",
                "masks",
                "dtype",
                "bits",
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


BUFFERS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "mask",
    "write_indices",
    "context",
    "present_key",
    "present_value",
    "past_key_scale",
    "past_value_scale",
    "present_key_scale",
    "present_value_scale",
)


class Buffers(ctypes.Structure):
    """AttentionBuffers, as Shape."""

    _fields_: ClassVar = [(name, ctypes.c_void_p) for name in BUFFERS]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        query: [B, heads, S, D].
        key, value: [B, kv_heads, S, D].
        past_key, past_value: [B, kv_heads, P, D]; codes where the cache has few bits.
        scales: of those, past_key_scale and past_value_scale [B, kv_heads, P, 2].
        bits: of the cache.
        mask: bool [B or 1, 1, S, T].
        write_indices: int64 [B], of a static cache.
        scale, softcap: of the scores.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past_key: np.ndarray
    past_value: np.ndarray
    mask: np.ndarray
    write_indices: np.ndarray | None = None
    scale: float = 0.125
    softcap: float = 0.0
    bits: int = 16
    scales: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """By the kernel's names."""
        found = {name: getattr(self, name) for name in BUFFERS[:7]} | self.scales
        return {
            name: np.ascontiguousarray(array) for name, array in found.items() if array is not None
        }

    @property
    def shape(self) -> Shape:
        """For the kernel."""
        batch, heads, tokens, width = self.query.shape
        return Shape(
            batch=batch,
            heads=heads,
            kv_heads=self.key.shape[1],
            head_dim=width,
            tokens=tokens,
            past=self.past_key.shape[2],
            static_cache=self.write_indices is not None,
            masks=len(self.mask),
            dtype=DTYPES[self.query.dtype],
            bits=self.bits,
            scale=self.scale,
            softcap=self.softcap,
        )


def make_case(
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    tokens: int = 3,
    past: int = 5,
    dtype: np.dtype[Any] = F16,
    window: int | None = None,
    places: tuple[int, ...] | None = None,
    padding: int = 0,
    seed: int = 0,
    softcap: float = 0.0,
    bits: int = 16,
) -> Case:
    """Random tensors, with scores of a few units.

    Args:
        window: of the mask.
        places: write_indices of a static cache with `past` rows; rows behind them hold NaN.
        padding: of the first sequence, on the left of a growing cache.
        bits: of the cache.
    """
    rng = np.random.default_rng(seed)

    def tensor(*dims: int) -> np.ndarray:
        return rng.normal(0, 1.5, dims).astype(dtype)

    new = (batch, kv_heads, tokens, head_dim)
    old = (batch, kv_heads, past, head_dim)
    total = past if places else past + tokens
    first = np.array(places if places else [past] * batch)
    queries = (first[:, None] + np.arange(tokens))[:, None, :, None]
    keys = np.arange(total)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    if padding:
        mask[0, :, :, :padding] = False
        mask |= keys == queries
    past_key, past_value = tensor(*old), tensor(*old)
    if places:
        for row, place in enumerate(places):
            past_key[row, :, place:] = past_value[row, :, place:] = np.nan
    scales = {}
    if bits < 16:
        past_key, scales["past_key_scale"] = stored(past_key, bits)
        past_value, scales["past_value_scale"] = stored(past_value, bits)
    return Case(
        query=tensor(batch, heads, tokens, head_dim),
        key=tensor(*new),
        value=tensor(*new),
        past_key=past_key,
        past_value=past_value,
        bits=bits,
        scales=scales,
        mask=mask,
        write_indices=np.array(places, np.int64) if places else None,
        scale=head_dim**-0.5,
        softcap=softcap,
    )


def chunk_of(case: Case, present: dict[str, np.ndarray], first: int, count: int) -> Case:
    """The call with `count` of a case's new tokens, from `first` on, once those before are cached.

    Args:
        present: the cache behind the whole case.
    """
    new = slice(first, first + count)
    growing = case.write_indices is None
    past = case.past_key.shape[2]
    cached = {
        name.replace("present", "past"): cache[:, :, : past + first] if growing else cache
        for name, cache in present.items()
    }
    return replace(
        case,
        **{name: getattr(case, name)[:, :, new] for name in ("query", "key", "value")},
        **{name: cached.pop(name) for name in ("past_key", "past_value")},
        scales=cached,
        mask=case.mask[:, :, new, : past + new.stop if growing else past],
        write_indices=None if case.write_indices is None else case.write_indices + first,
    )


Result = tuple[np.ndarray, dict[str, np.ndarray]]


def reference(case: Case) -> Result:
    """Context [B, S, heads D] in fp64, and the cache by its tensors' names."""
    present = {}
    for kind in ("key", "value"):
        new, parts = getattr(case, kind), [kind]
        rows = [new]
        if case.bits < 16:
            parts, rows = [kind, f"{kind}_scale"], list(stored(new, case.bits))
        for part, row in zip(parts, rows, strict=True):
            past = case.inputs[f"past_{part}"]
            if case.write_indices is None:
                present[f"present_{part}"] = np.concatenate([past, row], 2)
                continue
            present[f"present_{part}"] = past.copy()
            for sequence, place in enumerate(case.write_indices):
                end = place + new.shape[2]
                present[f"present_{part}"][sequence, :, place:end] = row[sequence]
    return _context(case, *(_numbers(case, present, kind) for kind in ("key", "value"))), present


def _numbers(case: Case, present: dict[str, np.ndarray], kind: str) -> np.ndarray:
    found = present[f"present_{kind}"]
    if case.bits < 16:
        scales = present[f"present_{kind}_scale"]
        found = stored_values(found, scales, case.bits, case.query.dtype)
    return found


def _context(case: Case, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    groups = case.query.shape[1] // case.key.shape[1]
    key, value = (np.repeat(part.astype(np.float64), groups, 1) for part in (key, value))
    scores = case.query.astype(np.float64) @ key.swapaxes(2, 3)
    if case.softcap:
        scores = scores.astype(case.query.dtype).astype(np.float64)
        scores = np.tanh(scores * case.scale / case.softcap) * case.softcap
    else:
        scores = scores * case.scale
    scores = np.where(case.mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    value = np.where(case.mask.any(2)[:, 0, None, :, None], value, 0)  # nobody sees it
    context = weights @ value
    context = context.transpose(0, 2, 1, 3)
    return context.reshape(*context.shape[:2], -1)


_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, _TASK, ctypes.c_void_p, ctypes.c_size_t)


class Parallel(ctypes.Structure):
    """anybit::cpu::Parallel of plugins/core/cpu/parallel.h."""

    _fields_: ClassVar = [
        ("run", _RUN),
        ("context", ctypes.c_void_p),
        ("threads", ctypes.c_int),
    ]


def parallel_of(threads: int) -> Parallel:
    """Threads that take the tasks from the last to the first."""

    def run(_: int | None, task: Callable[..., None], data: int, count: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda index: task(data, index), reversed(range(count))))

    return Parallel(_RUN(run), None, threads)


def attend(case: Case, isa: str, in_place: bool = False, code: int = 0, threads: int = 1) -> Result:
    """What the kernel of an instruction set makes of a case; checks that it wrote its outputs alone.

    Args:
        in_place: the past is the present too.
        code: which the function must return.
        threads: more than one: they take the tasks from the last to the first.
    """
    library = ctypes.CDLL(str(build_onnxruntime()))
    shape, inputs = case.shape, case.inputs
    blank = {
        "context": np.zeros(
            (shape.batch, shape.tokens, shape.heads * shape.head_dim), case.query.dtype
        )
    }
    for name, past in inputs.items():
        if name.startswith("past"):
            dims = list(past.shape)
            dims[2] += 0 if shape.static_cache else shape.tokens
            blank[f"present{name.removeprefix('past')}"] = np.zeros(dims, past.dtype)
    memory = {name: Memory(array, False) for name, array in (inputs | blank).items()}
    if in_place:
        for name in blank.keys() - {"context"}:
            memory[name] = memory[f"past{name.removeprefix('present')}"]
    buffers = Buffers(**{name: part.pointer for name, part in memory.items()})
    number = INSTRUCTION_SETS.index(isa)
    parallel = ctypes.byref(parallel_of(threads)) if threads > 1 else None
    got = library.anybit_attention(ctypes.byref(shape), ctypes.byref(buffers), number, parallel)
    assert got == code
    for name, part in memory.items():
        own = name in blank or (in_place and name.startswith("past"))
        assert not part.changed(guards_only=own and not code), name
    found = {
        name: np.frombuffer(memory[name].payload.tobytes(), array.dtype).reshape(array.shape)
        for name, array in blank.items()
    }
    return found.pop("context"), found


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Of the cache, which is copied; NaN as it was."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert got.tobytes() == want.tobytes()


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error of a token, relative to it."""
    difference = got.astype(np.float64) - want
    return float((np.linalg.norm(difference, axis=-1) / np.linalg.norm(want, axis=-1)).max())


def tolerance(dtype: np.dtype[Any]) -> float:
    """Rounding to the type, and fp32 sums in another order."""
    return {F16: 2.0**-11, BF16: 2.0**-8, F32: 0.0}[dtype] + 4e-6
