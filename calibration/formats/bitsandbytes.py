"""Reads checkpoints of bitsandbytes: NF4 and FP4 as floats, and the codes of LLM.int8().

The layout follows the library's QuantState and Linear8bitLt, as transformers saves them. A weight of
4 bits is a place in a table of 16 numbers, times the largest magnitude of its block; blocks run over
the whole matrix, row by row, and of two weights in a byte the first is in the high bits. These
magnitudes may be stored in 8 bits alike, with an offset. A weight of 8 bits is code * SCB / 127, SCB
being the largest magnitude of its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import Form, Stored, StoredFloats, StoredLinear
from calibration.out.json_file import Size, checked, parse_json
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["read"]

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_FOUR = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_EIGHT = ("weight", "SCB", "weight_format")
_AGAIN = "The checkpoint is damaged: download it again"


@dataclass(frozen=True)
class _State:
    """What the library says of a matrix of 4-bit weights, as JSON in a tensor of bytes."""

    shape: tuple[Size, Size]
    blocksize: Size
    nested_blocksize: Size | None = None
    nested_offset: float | None = None


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint; the tensors tell by themselves what they are.

    Raises:
        InputError: tensors that do not fit together.
    """
    four = dict.fromkeys(
        name.partition(".weight.")[0] for name in tensors.shapes if ".weight." in name
    )
    eight = tensors.layers("SCB")
    linears = {layer: _four_bits(layer, tensors) for layer in four} | {
        layer: _eight_bits(layer, tensors) for layer in eight
    }
    ends = ["weight", *(f"weight.{end}" for end in _FOUR), *(_STATE + kind for kind in _KINDS)]
    used = {f"{layer}.{end}" for layer in four for end in ends}
    return Stored(linears, used | {f"{layer}.{end}" for layer in eight for end in _EIGHT})


# ---------------------------------------------------------------- 8 bits


def _eight_bits(layer: str, tensors: Tensors) -> StoredLinear:
    rows, columns = tensors.shape(layer, "weight", (None, None))
    tensors.shape(layer, "SCB", (rows,))
    place, order = tensors.place(layer), f"{layer}.weight_format"
    if order in tensors.shapes and tensors.weights.array(order).any():
        raise InputError(
            f"{place}.weight_format",
            "got weights in the order of a GPU's kernels, expected 0, which stands for rows",
            "Load and save the checkpoint with a newer bitsandbytes",
        )
    form = Form(code_set(8, False), symmetric=True)
    return StoredLinear(place, (rows, columns), form, partial(_codes, tensors, layer))


def _codes(tensors: Tensors, layer: str) -> QuantArrays:
    codes = tensors.integers(layer, "weight", "int8").view(np.uint8) + np.uint8(128)
    # a row of zeros has the magnitude 0
    scale = (tensors.numbers(layer, "SCB") / np.float32(127)).reshape(-1, 1)
    return QuantArrays(codes, scale, np.full(scale.shape, 128, np.int32))


# ---------------------------------------------------------------- 4 bits


def _four_bits(layer: str, tensors: Tensors) -> StoredFloats:
    place = tensors.place(layer)
    kinds = [kind for kind in _KINDS if f"{layer}.{_STATE}{kind}" in tensors.shapes]
    if len(kinds) != 1:
        raise InputError(
            place,
            f"got {len(kinds)} tensors {_STATE}*, expected one for nf4 or fp4",
            "Save the checkpoint with a newer bitsandbytes, or download it again",
        )
    end = _STATE + kinds[0]
    told = parse_json(tensors.integers(layer, end, "uint8").tobytes(), f"{place}.{end}", _AGAIN)
    state = checked(told, _State, f"{place}.{end}", _AGAIN)
    rows, columns = state.shape
    blocks = -(-rows * columns // state.blocksize)
    tensors.shape(layer, "weight.quant_map", (16,))
    tensors.shape(layer, "weight.absmax", (blocks,))
    if state.nested_blocksize is not None:
        if state.nested_offset is None:
            raise InputError(
                f"{place}.{end}",
                "got no nested_offset, expected it beside nested_blocksize",
                _AGAIN,
            )
        tensors.shape(layer, "weight.nested_absmax", (-(-blocks // state.nested_blocksize),))
        tensors.shape(layer, "weight.nested_quant_map", (256,))
    tensors.shape(layer, "weight", (None, 1))
    size, wanted = tensors.weights.array(f"{layer}.weight").nbytes, -(-rows * columns // 2)
    if size != wanted:
        raise InputError(
            f"{place}.weight",
            f"got {size} bytes, expected {wanted} of {rows} x {columns} weights",
            _AGAIN,
        )
    return StoredFloats((rows, columns), partial(_floats, tensors, layer, state))


def _floats(tensors: Tensors, layer: str, state: _State) -> np.ndarray:
    count = state.shape[0] * state.shape[1]
    table = tensors.numbers(layer, "weight.quant_map")
    packed = np.ascontiguousarray(tensors.weights.array(f"{layer}.weight")).view(np.uint8)
    pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1)  # by the byte
    weight = pairs[packed.reshape(-1)].reshape(-1)[:count]
    magnitudes, whole = _magnitudes(tensors, layer, state), count // state.blocksize
    blocks = weight[: whole * state.blocksize].reshape(-1, state.blocksize)  # a view
    blocks *= magnitudes[:whole, None]
    weight[whole * state.blocksize :] *= magnitudes[-1]
    return weight.reshape(state.shape)


def _magnitudes(tensors: Tensors, layer: str, state: _State) -> np.ndarray:
    """Of the blocks, fp32."""
    if state.nested_blocksize is None:
        return tensors.numbers(layer, "weight.absmax")
    table = tensors.numbers(layer, "weight.nested_quant_map")
    found: np.ndarray = table[tensors.integers(layer, "weight.absmax", "uint8")]
    whole = tensors.numbers(layer, "weight.nested_absmax")
    found *= np.repeat(whole, state.nested_blocksize)[: len(found)]
    assert state.nested_offset is not None
    found += np.float32(state.nested_offset)
    return found
