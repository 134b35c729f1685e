"""Reads AWQ checkpoints in the layout called GEMM, as AutoAWQ writes them.

The layout follows AutoAWQ's own layers: 4-bit codes along the output, eight to an int32 word in the
order of channels 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on, zero points alike, both as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import FLOAT_MODEL, Form, Stored, StoredLinear, regrouped
from calibration.out.json_file import checked
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from plugins.text import shown

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["CONFIG_FILE", "read"]

CONFIG_FILE = "quant_config.json"  # where config.json of an older checkpoint says nothing
_BITS, _PER_WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ENDS = ("qweight", "qzeros", "scales")
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class _Config:
    bits: int
    group_size: int
    version: str = "gemm"
    zero_point: bool = True


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint.

    Raises:
        InputError: settings that are none or that cannot be read, and tensors that do not fit them.
    """
    where = f"{tensors.where}, quantization config"
    known = {_OLD_NAMES.get(key, key): value for key, value in config.items() if value is not None}
    settings = checked(known, _Config, where, "Correct the config")
    for problem, fine in {
        f"bits {settings.bits}, expected {_BITS}": settings.bits == _BITS,
        f"group_size {settings.group_size}, expected -1 or a number above 0": settings.group_size
        == -1
        or settings.group_size > 0,
        f"version {shown(settings.version)}, expected gemm": settings.version.lower() == "gemm",
        "zero_point false, expected codes with zero points": settings.zero_point,
    }.items():
        if not fine:
            raise InputError(where, f"got {problem}", FLOAT_MODEL)
    linears = {
        layer: _linear(layer, settings.group_size, tensors) for layer in tensors.layers("qweight")
    }
    return Stored(linears, {f"{layer}.{end}" for layer in linears for end in _ENDS})


def _linear(layer: str, group_size: int, tensors: Tensors) -> StoredLinear:
    columns, words = tensors.shape(layer, "qweight", (None, None))
    group = columns if group_size == -1 else min(group_size, columns)
    groups, rows = -(-columns // group), words * _PER_WORD
    tensors.shape(layer, "scales", (groups, rows))
    tensors.shape(layer, "qzeros", (groups, words))
    smaller = gcd(group, columns)  # of a last group that is cut short
    form = Form(code_set(_BITS, False), 0 if smaller == columns else smaller)
    arrays = partial(_arrays, tensors, layer, (group, smaller, columns))
    return StoredLinear(tensors.place(layer), (rows, columns), form, arrays)


def _arrays(tensors: Tensors, layer: str, groups: tuple[int, int, int]) -> QuantArrays:
    codes, zero = (_unpacked(tensors.integers(layer, end)) for end in ("qweight", "qzeros"))
    return QuantArrays(
        codes,
        np.ascontiguousarray(regrouped(tensors.scales(layer, "scales").T, *groups)),
        np.ascontiguousarray(regrouped(zero, *groups), np.int32),
    )


def _unpacked(words: np.ndarray) -> np.ndarray:
    """int32 [n, N / 8] -> uint8 [N, n]."""
    unsigned = np.ascontiguousarray(words.T).view(np.uint32)
    found = np.empty((len(unsigned) * _PER_WORD, unsigned.shape[1]), np.uint8)
    for place, channel in enumerate(_ORDER):
        found[channel::_PER_WORD] = unsigned >> (_BITS * place) & 15
    return found
