"""Reads checkpoints in fp8 (e4m3) as floats: no op takes such numbers as they are.

A weight is its fp8 number times weight_scale_inv of its block, or of the tensor, as transformers'
fine-grained fp8 and DeepSeek's checkpoints have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import FLOAT_MODEL, Stored, StoredFloats
from calibration.out.json_file import checked
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["read"]

_SCALE, _TYPE = "weight_scale_inv", "float8_e4m3fn"
_LEFT = "activation_scale"  # of activations, which are rounded otherwise here


@dataclass(frozen=True)
class _Config:
    weight_block_size: tuple[int, int] | None = None


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint.

    Raises:
        InputError: settings that are none, and tensors that do not fit them.
    """
    where = f"{tensors.where}, quantization config"
    block = checked(dict(config), _Config, where, "Correct the config").weight_block_size
    if block is not None and min(block) < 1:
        raise InputError(
            where, f"got weight_block_size {list(block)}, expected numbers above 0", FLOAT_MODEL
        )
    layers = tensors.layers(_SCALE)
    linears = {layer: _linear(layer, block, tensors) for layer in layers}
    return Stored(
        linears, {f"{layer}.{end}" for layer in layers for end in ("weight", _SCALE, _LEFT)}
    )


def _linear(layer: str, block: tuple[int, int] | None, tensors: Tensors) -> StoredFloats:
    rows, columns = tensors.shape(layer, "weight", (None, None))
    if block is not None:
        tensors.shape(layer, _SCALE, (-(-rows // block[0]), -(-columns // block[1])))
    elif prod(found := tensors.shapes[f"{layer}.{_SCALE}"]) != 1:
        raise InputError(
            f"{tensors.place(layer)}.{_SCALE}",
            f"got shape {list(found)}, expected one number, because the config has no "
            "weight_block_size",
            "Correct the config, or give the float model it was made from",
        )
    return StoredFloats((rows, columns), partial(_floats, tensors, layer, block))


def _floats(tensors: Tensors, layer: str, block: tuple[int, int] | None) -> np.ndarray:
    weight = tensors.integers(layer, "weight", _TYPE).astype(np.float32)
    scale = tensors.scales(layer, _SCALE)
    if block is None:
        weight *= scale.reshape(-1)[0]
        return weight
    for number, row in enumerate(scale):  # a row of blocks at a time
        part = slice(number * block[0], (number + 1) * block[0])
        weight[part] *= np.repeat(row, block[1])[: weight.shape[1]]
    return weight
