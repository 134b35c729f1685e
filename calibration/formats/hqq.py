"""Reads HQQ checkpoints, as transformers saves the layers of the package hqq.

A weight is scale * (code - zero) with a zero between codes. A matrix is cut into groups of
neighbours (axis 1) or of weights that lie far apart (axis 0), and packed along the first axis of what
that gives: of 4-bit codes [2 n, m] the first n rows are in the high bits of the bytes [n, m], and so
on; ten 3-bit codes are in a word of 32 bits.

Why codes can be kept: scales and zeros in 16 bits have products that are exact in fp32, so that
scale * code - scale * zero is the weight, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import FLOAT_MODEL, Form, Stored, StoredFloats, StoredLinear
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from plugins.text import shown

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["read"]

_ENDS = (
    "W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype",
    "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_AGAIN = "The checkpoint is damaged: download it again"


@dataclass(frozen=True)
class _Packing:
    """How codes lie in what is stored: a number of so many bytes has `count` codes of `bits`."""

    bits: int
    count: int
    dtype: str


_PACKINGS = {
    "8bit_u8": _Packing(8, 1, "uint8"),
    "4bit_u8": _Packing(4, 2, "uint8"),
    "3bit_32": _Packing(3, 10, "int32"),
    "2bit_u8": _Packing(2, 4, "uint8"),
    "1bit_u8": _Packing(1, 8, "uint8"),
}


@dataclass(frozen=True)
class _Matrix:
    """How a layer is stored.

    Attributes:
        shape: (out_features, in_features).
        bits: of its codes.
        group: weights that share a scale and a zero.
        axis: along which a group lies once the matrix is cut.
        packing: see _Packing.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    axis: int
    packing: _Packing

    @property
    def cut(self) -> tuple[int, int]:
        """The matrix cut into groups."""
        groups = self.shape[0] * self.shape[1] // self.group
        return (groups, self.group) if self.axis else (self.group, groups)

    @property
    def in_rows(self) -> bool:
        """Whether a group is of neighbours in one row."""
        return self.axis == 1 and self.shape[1] % self.group == 0


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint; each says by itself how it is stored.

    Raises:
        InputError: settings that cannot be read, and tensors that do not fit them.
    """
    layers = tensors.layers("W_q")
    linears = {layer: _linear(layer, tensors) for layer in layers}
    return Stored(linears, {f"{layer}.{end}" for layer in layers for end in _ENDS})


def _linear(layer: str, tensors: Tensors) -> StoredLinear | StoredFloats:
    matrix = _matrix(layer, tensors)
    groups = matrix.cut[0] if matrix.axis else matrix.cut[1]
    shape = (groups, 1) if matrix.axis else (1, groups)
    kinds = set()
    for end in ("scale", "zero"):
        tensors.shape(layer, end, shape)
        kinds.add(tensors.weights.array(f"{layer}.{end}").dtype.itemsize)
    if not matrix.in_rows or kinds != {2}:
        return StoredFloats(matrix.shape, partial(_floats, tensors, layer, matrix))
    size = 0 if matrix.group == matrix.shape[1] else matrix.group
    form = Form(code_set(matrix.bits, False), size, minimum=True)
    return StoredLinear(
        tensors.place(layer), matrix.shape, form, partial(_arrays, tensors, layer, matrix)
    )


def _matrix(layer: str, tensors: Tensors) -> _Matrix:
    place = tensors.place(layer)
    tensors.shape(layer, "shape", (2,))
    rows, columns = tensors.integers(layer, "shape", "int64").tolist()
    tensors.shape(layer, "packing", (None,))
    name = tensors.integers(layer, "packing", "uint8").tobytes().decode("latin-1")
    group, axis = (_number(tensors, layer, end) for end in ("group_size", "axis"))
    bits = math.ceil(_number(tensors, layer, "nbits"))
    packing = _PACKINGS.get(name)
    problems = {
        f"{rows} x {columns} weights, expected whole numbers above 0": min(rows, columns) > 0,
        f"packing {shown(name)}, expected one of {', '.join(_PACKINGS)}": packing is not None,
        f"{bits} bits, expected 1 to {packing.bits if packing else 8} of packing {shown(name)}": (
            packing is None or 1 <= bits <= packing.bits
        ),
        f"axis {axis:g}, expected 0 or 1": axis in (0, 1),
        f"group_size {group:g}, expected a divisor of {rows * columns} weights": group >= 1
        and rows * columns % group == 0,
        "scales or zeros that are quantized themselves, expected numbers": not any(
            _number(tensors, layer, end)
            for end in ("quant_scale", "quant_zero")
            if f"{layer}.{end}" in tensors.shapes
        ),
    }
    for problem, fine in problems.items():
        if not fine:
            raise InputError(place, f"got {problem}", FLOAT_MODEL)
    assert packing is not None
    matrix = _Matrix((rows, columns), bits, int(group), int(axis), packing)
    size = tensors.weights.array(f"{layer}.W_q").nbytes
    words = -(-matrix.cut[0] // packing.count) * matrix.cut[1]
    if (wanted := words * np.dtype(packing.dtype).itemsize) != size:
        raise InputError(
            f"{place}.W_q", f"got {size} bytes, expected {wanted} by its shape", _AGAIN
        )
    return matrix


def _number(tensors: Tensors, layer: str, end: str) -> float:
    tensors.shape(layer, end, ())
    found = float(tensors.weights.array(f"{layer}.{end}"))
    if not math.isfinite(found):
        raise InputError(
            f"{tensors.place(layer)}.{end}", f"got {found}, expected a finite number", _AGAIN
        )
    return found


def _codes(tensors: Tensors, layer: str, matrix: _Matrix) -> np.ndarray:
    """uint8, as the matrix is cut.

    Raises:
        InputError: a code of more bits than the layer's.
    """
    height, width = matrix.cut
    bits, count = matrix.packing.bits, matrix.packing.count
    stored = np.ascontiguousarray(tensors.weights.array(f"{layer}.W_q")).reshape(-1)
    words = stored.view(matrix.packing.dtype).reshape(-1, width)
    mask = (1 << bits) - 1
    parts = [(words >> bits * place & mask).astype(np.uint8) for place in reversed(range(count))]
    codes = np.concatenate(parts)[:height]
    if (highest := int(codes.max())) >> matrix.bits:
        raise InputError(
            f"{tensors.place(layer)}.W_q",
            f"got the code {highest}, expected at most {(1 << matrix.bits) - 1} of {matrix.bits} bits",
            _AGAIN,
        )
    return codes


def _arrays(tensors: Tensors, layer: str, matrix: _Matrix) -> QuantArrays:
    rows, columns = matrix.shape
    scale, zero = (
        tensors.numbers(layer, end).reshape(rows, columns // matrix.group)
        for end in ("scale", "zero")
    )
    codes = _codes(tensors, layer, matrix).reshape(rows, columns)
    return QuantArrays(codes, scale, minimum=-(scale * zero))


def _floats(tensors: Tensors, layer: str, matrix: _Matrix) -> np.ndarray:
    weight = _codes(tensors, layer, matrix).astype(np.float32)
    weight -= tensors.numbers(layer, "zero")
    weight *= tensors.numbers(layer, "scale")
    return weight.reshape(matrix.shape)
