"""Reads the checkpoints that ABQ-LLM saves: weights already rounded, as floats, and the scales and
zero points by which they were.

No config says so: the tensors weight_quantizer.scales and .zeros of each layer do (bytedance/ABQ-LLM,
quantizer.py). The codes are the weights divided by the scales, plus the zero points; that they give
the weights back is checked. 1 and 2 bits are the sets of 3 and 5 codes there, whatever the highest
code found is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import FLOAT_MODEL, Form, Stored, StoredLinear
from plugins.core.code_sets import CODE_SETS, CodeSet
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["SIGN", "read"]

SIGN = ".weight_quantizer.scales"
_SCALES, _ZEROS = "weight_quantizer.scales", "weight_quantizer.zeros"
# Left over from training, and without part in the result: the weights have all of it in them.
_TRAINED = ("_smooth_scale", "_smooth_shift", "_compensation_left", "_compensation_right")
_BOUNDS = (".upbound_factor", ".lowbound_factor")
_LOOKED_AT = 7  # layers whose highest code tells the number of codes
_NEAR = 2.0**-7  # of a weight in steps to its code: bfloat16's rounding of codes up to 255 is more


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint.

    Raises:
        InputError: tensors that do not fit together, or weights that no codes give.
    """
    layers = tensors.layers(_SCALES)
    shapes = {layer: _shape(layer, tensors) for layer in layers}
    levels = 1 + max(int(_codes(tensors, layer)[0].max()) for layer in islice(layers, _LOOKED_AT))
    codes = _code_set(levels, tensors.where)
    linears = {layer: _linear(layer, codes, shapes[layer], tensors) for layer in layers}
    left = {name for name in tensors.shapes if name.endswith((*_TRAINED, *_BOUNDS))}
    own = {f"{layer}.{end}" for layer in layers for end in ("weight", _SCALES, _ZEROS)}
    return Stored(linears, own | left, tensors.empty_biases())


def _code_set(levels: int, where: str) -> CodeSet:
    for codes in sorted(CODE_SETS, key=lambda codes: codes.levels):
        if codes.levels >= levels and (codes.balanced or codes.bits > 2):
            return codes
    raise InputError(where, f"got {levels} codes of a weight, expected at most 256", FLOAT_MODEL)


def _shape(layer: str, tensors: Tensors) -> tuple[int, int, int]:
    """Output channels, input channels, and groups of these."""
    rows, columns = tensors.shape(layer, "weight", (None, None))
    total, _ = tensors.shape(layer, _SCALES, (None, 1))
    tensors.shape(layer, _ZEROS, (total, 1))
    groups = total // rows
    if total % rows or not groups or columns % groups:
        raise InputError(
            f"{tensors.place(layer)}.{_SCALES}",
            f"got {total} scales of {rows} x {columns} weights, expected as many for each row, in "
            "groups of one size",
            FLOAT_MODEL,
        )
    return rows, columns, groups


def _linear(
    layer: str, codes: CodeSet, shape: tuple[int, int, int], tensors: Tensors
) -> StoredLinear:
    rows, columns, groups = shape
    form = Form(codes, columns // groups if groups > 1 else 0, act_symmetric=False)
    arrays = partial(_arrays, tensors, layer, codes)
    return StoredLinear(tensors.place(layer), (rows, columns), form, arrays)


def _arrays(tensors: Tensors, layer: str, codes: CodeSet) -> QuantArrays:
    found, scale, zero = _codes(tensors, layer)
    if int(found.max()) >= codes.levels:
        raise InputError(
            tensors.place(layer),
            f"got the code {found.max()}, expected at most {codes.levels - 1} as in the first layers",
            FLOAT_MODEL,
        )
    return QuantArrays(found.astype(np.uint8), scale, zero)


def _codes(tensors: Tensors, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int32 [N, K], scales and zero points [N, G].

    Raises:
        InputError: the weights are no multiples of the scales, codes below 0, or zero points that are
            no whole numbers.
    """
    weight = np.asarray(tensors.weights.array(f"{layer}.weight"), np.float32)
    scale = tensors.scales(layer, _SCALES).reshape(len(weight), -1)
    zero = np.asarray(tensors.weights.array(f"{layer}.{_ZEROS}"), np.float32).reshape(scale.shape)
    broken = np.argwhere(zero != np.rint(zero))
    if len(broken):
        raise InputError(
            f"{tensors.place(layer)}.{_ZEROS}",
            f"got the zero point {zero[tuple(broken[0])]:g} and {len(broken)} such in all, expected "
            "whole numbers",
            FLOAT_MODEL,
        )
    steps = weight.reshape(*scale.shape, -1) / scale[..., None]
    whole = np.rint(steps)
    off = float(np.abs(steps - whole).max())
    low = float((whole + zero[..., None]).min())
    if not (off <= _NEAR * max(1.0, float(np.abs(whole).max())) and off < 0.5 and low >= 0):
        raise InputError(
            tensors.place(layer),
            f"got weights {off:.3g} of a scale away from its multiples, and codes from {low:g}, "
            "expected weights that were rounded on these scales and zero points",
            FLOAT_MODEL,
        )
    codes = (whole + zero[..., None]).astype(np.int32).reshape(weight.shape)
    return codes, scale, zero.astype(np.int32)
