"""The native kernels between the GEMMs and attention against numpy, for every instruction set: the
same bits, or NaN for NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from plugins.core.activation import rms_norm
from plugins.pointwise.forms import ALL_HEADS, EACH_HEAD, NO_NORM
from plugins.tools.build import build_onnxruntime
from plugins.tools.kernels import DTYPES
from tests.plugins.attention_runner import parallel_of
from tests.plugins.kernel_cases import BF16, F16, F32
from tests.plugins.kernel_runner import INSTRUCTION_SETS, Memory, cpu_missing

KINDS = ("silu", "gelu_tanh", "relu2")
FLOATS = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
Arrays = dict[str, np.ndarray]


class Rows(ctypes.Structure):
    """RowsShape of plugins/pointwise/cpu/pointwise.h."""

    _fields_: ClassVar = [
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class Heads(ctypes.Structure):
    """HeadsShape."""

    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "batch",
                "tokens",
                "heads",
                "kv_heads",
                "head_dim",
                "rotary",
                "positions",
                "norm",
                "dtype",
            )
        ),
        ("query_epsilon", ctypes.c_float),
        ("key_epsilon", ctypes.c_float),
    ]


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    """An instruction set of this machine."""
    if reason := cpu_missing(request.param):
        pytest.skip(reason)
    return str(request.param)


def call(
    isa: str,
    function: str,
    arguments: list[Any],
    inputs: dict[str, np.ndarray | None],
    outputs: Arrays,
    code: int = 0,
    threads: int = 1,
) -> Arrays:
    """Outputs of a function of pointwise.h; checks that it wrote nothing else.

    Args:
        arguments: before the buffers.
        inputs, outputs: in the order of the buffers' fields; an input may be null.
        code: which the function must return.
        threads: more than one: they take the tasks from the last to the first.
    """
    blank = {name: np.zeros_like(array) for name, array in outputs.items()}
    given = {name: array for name, array in inputs.items() if array is not None} | blank
    memory = {name: Memory(np.ascontiguousarray(array), False) for name, array in given.items()}
    names = [*inputs, *outputs]
    buffers = (ctypes.c_void_p * len(names))(
        *(memory[name].pointer if name in memory else None for name in names)
    )
    parallel = ctypes.byref(parallel_of(threads)) if threads > 1 else None
    library = ctypes.CDLL(str(build_onnxruntime()))
    number = INSTRUCTION_SETS.index(isa)
    assert getattr(library, function)(*arguments, buffers, number, parallel) == code
    for name, part in memory.items():
        assert not part.changed(guards_only=name in outputs and not code), name
    return {
        name: np.frombuffer(memory[name].payload.tobytes(), array.dtype).reshape(array.shape)
        for name, array in outputs.items()
    }


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    assert got[~nan].tobytes() == want[~nan].tobytes()


def rounded(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """fp64 by way of fp32, as a Cast does."""
    return x.astype(np.float32).astype(dtype)


def numbers(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(dtype)


def hard(dtype: np.dtype[Any]) -> np.ndarray:
    """Every 16-bit number there is; of fp32 those of all exponents, with random bits behind."""
    if dtype.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    return (bits | np.random.default_rng(1).integers(0, 1 << 16, 1 << 16, np.uint32)).view(dtype)


def summed(stream: np.ndarray, value: np.ndarray, multiplier: float) -> np.ndarray:
    wide = value.astype(np.float32)
    if multiplier != 1:
        wide = rounded(wide * np.float32(multiplier), stream.dtype).astype(np.float32)
    return rounded(stream.astype(np.float32) + wide, stream.dtype)


def activated(x: np.ndarray, kind: str) -> np.ndarray:
    wide = x.astype(np.float64)
    if kind == "relu2":
        positive = np.maximum(x.astype(np.float32), 0)
        return rounded(positive * positive, x.dtype)
    if kind == "gelu_tanh":
        inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * (wide * wide * wide))
        return rounded(0.5 * wide * (1 + np.tanh(inner)), x.dtype)
    sigmoid = rounded(1 / (1 + np.exp(-wide)), x.dtype)
    return rounded(x.astype(np.float32) * sigmoid.astype(np.float32), x.dtype)


@FLOATS
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.filterwarnings("ignore:(overflow|invalid)")
def test_residual_sums(isa: str, dtype: np.dtype[Any], multiplier: float) -> None:
    """Of any number with any other, with overflow, inf and NaN among them."""
    stream = hard(dtype)
    for value in (np.roll(stream, 12345), stream[::-1].copy(), numbers(stream.shape, dtype)):
        for width in (1 << 16, 1, 37):
            rows = len(stream) // width
            x, y = stream[: rows * width], value[: rows * width]
            shape = ctypes.byref(Rows(rows, width, DTYPES[dtype]))
            want = summed(x, y, multiplier)
            got = call(
                isa,
                "anybit_residual_sum",
                [shape, ctypes.c_float(multiplier)],
                {"stream": x, "value": y},
                {"sum": want},
                threads=3,
            )
            same(got["sum"], want)


def run_activation(isa: str, x: np.ndarray, kind: str, gated: bool, threads: int) -> np.ndarray:
    width = x.shape[1] // 2 if gated else x.shape[1]
    shape = ctypes.byref(Rows(len(x), width, DTYPES[x.dtype]))
    blank = {"y": np.zeros((len(x), width), x.dtype)}
    arguments = [shape, KINDS.index(kind), int(gated)]
    return call(isa, "anybit_activation", arguments, {"x": x}, blank, threads=threads)["y"]


@FLOATS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:(overflow|invalid)")
def test_activations(isa: str, dtype: np.dtype[Any], kind: str) -> None:
    """Of every number, and of rows of odd lengths. In fp32 one of some million may round otherwise
    than with numpy's exponential; below -6 GELU's definition loses bits in fp64, and a 16-bit type
    shows whose.
    """
    x = hard(dtype)
    got, want = run_activation(isa, x[None], kind, False, 1)[0], activated(x, kind)
    if dtype == F32:
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        np.testing.assert_allclose(got[finite], want[finite], rtol=2e-7, atol=1e-15)
    else:
        certain = np.ones(x.shape, bool) if kind != "gelu_tanh" else ~(x.astype(np.float32) < -6)
        same(got[certain], want[certain])
        np.testing.assert_allclose(
            got[~certain].astype(np.float32), want[~certain].astype(np.float32), atol=2e-15
        )
    for rows, width in ((3, 2), (5, 74), (1, 1536), (70, 1026)):
        gate = numbers((rows, width // 2), dtype)
        up = numbers((rows, width // 2), dtype, seed=1)
        alone = run_activation(isa, gate, kind, False, 1)
        product = rounded(alone.astype(np.float32) * up.astype(np.float32), dtype)
        both = np.concatenate([gate, up], 1)
        same(run_activation(isa, both, kind, True, 2), product)


def test_instruction_sets_give_the_same_bits() -> None:
    sets = [isa for isa in INSTRUCTION_SETS if not cpu_missing(isa)]
    x = hard(F32)[None]
    for kind in KINDS:
        found = [run_activation(isa, x, kind, False, 1) for isa in sets]
        for other in found[1:]:
            same(other, found[0])


@FLOATS
@pytest.mark.filterwarnings("ignore:(overflow|invalid)")
def test_norms(isa: str, dtype: np.dtype[Any]) -> None:
    """Of odd widths, of rows of zeros, NaN, inf and the largest numbers."""
    for rows, width in ((1, 1), (4, 64), (9, 575), (130, 300)):
        x, gain = numbers((rows, width), dtype), numbers((width,), dtype, seed=1)
        x[rows // 2] = 0
        if rows > 4:
            x[0, 3], x[1, 4], x[2] = np.nan, np.inf, np.finfo(np.float16).max
        want = rms_norm(x, gain, 1e-5)
        shape = ctypes.byref(Rows(rows, width, DTYPES[dtype]))
        arguments = [shape, ctypes.c_float(1e-5)]
        inputs = {"x": x, "gain": gain}
        got = call(isa, "anybit_rms_norm", arguments, inputs, {"y": want}, threads=2)["y"]
        same(got, want)


HEADS: list[dict[str, int]] = [
    {},
    {"rotary": 16},
    {"rotary": 6, "head_dim": 10, "heads": 3, "kv_heads": 1, "batch": 3},
    {"rotary": 64, "head_dim": 64, "norm": EACH_HEAD, "tokens": 1},
    {"rotary": 150, "head_dim": 300, "norm": ALL_HEADS},
    {"head_dim": 33, "norm": EACH_HEAD},
    {"norm": ALL_HEADS, "head_dim": 1024, "heads": 2, "tokens": 2},
    {"rotary": 128, "head_dim": 128, "tokens": 90, "heads": 8},
]


def heads_case(dtype: np.dtype[Any], fields: dict[str, int]) -> tuple[Heads, Arrays]:
    s = Heads(
        **{"batch": 2, "tokens": 5, "heads": 4, "kv_heads": 2, "head_dim": 16, **fields},
        positions=70,
        dtype=DTYPES[dtype],
        query_epsilon=1e-5,
        key_epsilon=1e-3,
    )
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    angles = np.arange(70)[:, None] * np.exp(-np.arange(s.rotary // 2))
    normed = {EACH_HEAD: (1, 1), ALL_HEADS: (s.heads, s.kv_heads)}.get(s.norm)
    gains = [numbers((count * s.head_dim,), dtype, 2) for count in normed] if normed else [None] * 2
    tables = [wave(angles).astype(dtype) if s.rotary else None for wave in (np.cos, np.sin)]
    places = np.random.default_rng(4).integers(0, 70, (s.batch, s.tokens))
    inputs = {
        "qkv": numbers((s.batch, s.tokens, width), dtype),
        "position_ids": places if s.rotary else None,
        "cos": tables[0],
        "sin": tables[1],
        "query_gain": gains[0],
        "key_gain": gains[1],
    }
    return s, inputs


def rotated_heads(s: Heads, inputs: Arrays) -> Arrays:
    qkv = inputs["qkv"]
    rows = qkv.reshape(s.batch, s.tokens, -1, s.head_dim)
    parts = np.split(rows, [s.heads, s.heads + s.kv_heads], 2)
    found = {}
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        if name != "value" and s.norm != NO_NORM:
            gain, epsilon = inputs[f"{name}_gain"], getattr(s, f"{name}_epsilon")
            flat = part.reshape(s.batch, s.tokens, -1, len(gain))
            part = rms_norm(flat, gain, epsilon).reshape(part.shape)
        if name != "value" and s.rotary:
            half, wide = s.rotary // 2, part.astype(np.float64)
            cos, sin = (
                inputs[wave][inputs["position_ids"]][:, :, None].astype(np.float64)
                for wave in ("cos", "sin")
            )
            low, high = wide[..., :half], wide[..., half : s.rotary]
            turned = [low * cos - high * sin, low * sin + high * cos, wide[..., s.rotary :]]
            part = rounded(np.concatenate(turned, -1), qkv.dtype)
        found[name] = np.ascontiguousarray(part.transpose(0, 2, 1, 3))
    return found


def run_heads(isa: str, s: Heads, inputs: Arrays, outputs: Arrays, **options: int) -> Arrays:
    return call(isa, "anybit_rotated_heads", [ctypes.byref(s)], {**inputs}, outputs, **options)


@FLOATS
@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_rotated_heads(isa: str, dtype: np.dtype[Any], fields: dict[str, int]) -> None:
    s, inputs = heads_case(dtype, fields)
    want = rotated_heads(s, inputs)
    for threads in (1, 2):
        got = run_heads(isa, s, inputs, want, threads=threads)
        for name, heads in want.items():
            same(got[name], heads)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, inputs: setattr(s, "head_dim", 1025),
        lambda s, inputs: setattr(s, "rotary", 15),
        lambda s, inputs: setattr(s, "rotary", 18),
        lambda s, inputs: setattr(s, "heads", 0),
        lambda s, inputs: setattr(s, "norm", 3),
        lambda s, inputs: setattr(s, "dtype", 3),
        lambda s, inputs: inputs.update(cos=None),
        lambda s, inputs: inputs["position_ids"].fill(70),
        lambda s, inputs: inputs["position_ids"].fill(-1),
    ],
)
def test_what_no_kernel_takes_is_refused(change: Callable[[Heads, Arrays], None]) -> None:
    s, inputs = heads_case(F16, {"rotary": 16})
    outputs = rotated_heads(s, inputs)
    run_heads("portable", s, inputs, outputs)
    change(s, inputs)
    run_heads("portable", s, inputs, outputs, code=1)


def test_nothing_to_do() -> None:
    s, inputs = heads_case(F16, {"rotary": 16, "tokens": 0})
    run_heads("portable", s, inputs, {name: np.zeros(0, F16) for name in ("query", "key", "value")})
    blank = np.zeros((0, 4), F16)
    assert run_activation("portable", blank, "silu", True, 1).shape == (0, 2)
