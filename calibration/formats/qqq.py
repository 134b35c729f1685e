"""Reads QQQ's checkpoints (W4A8): tensors B, s_channel and s_group of each layer.

The layout follows the packing in QQQ's repository (HandH1998/QQQ, qlinear_marlin.py): nibbles in the
order of QQQGemm itself, scales in the order in which the kernel's threads read them. Codes per
output channel are multiplied as 16 times themselves, so that s_channel is a sixteenth of the scale;
per group s_channel is the second level's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import FLOAT_MODEL, Form, Stored, StoredLinear
from calibration.out.json_file import checked
from plugins import op_spec, ranked_ops
from plugins.core.code_sets import code_set
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["read"]

_BITS, _ABITS, _GROUP = 4, 8, 128
_ENDS = ("B", "s_channel", "s_group", "workspace", "reduce_buffer")  # the last two hold no weights
_TILE_K, _TILE_N = 16, 64
# The output channel of each stored scale, within 32 (s_channel) and 64 (s_group).
_CHANNELS = np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
_GROUPED = np.array([i + 8 * j for i in range(8) for j in range(8)])
_SIXTEEN = np.float32(16)


def _op() -> str:
    """The op whose packed weights these are."""
    return next(op.name for op in ranked_ops() if op.published == "qqq")


@dataclass(frozen=True)
class _Config:
    group_size: int
    bits: int = _BITS


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint.

    Raises:
        InputError: settings that are none or that cannot be read, and tensors that do not fit them.
    """
    where = f"{tensors.where}, quantization config"
    known = {"bits" if key == "wbits" else key: value for key, value in config.items()}
    settings = checked(known, _Config, where, "Correct the config")
    for problem, fine in {
        f"bits {settings.bits}, expected {_BITS}": settings.bits == _BITS,
        f"group_size {settings.group_size}, expected -1 or {_GROUP}": settings.group_size
        in (-1, _GROUP),
    }.items():
        if not fine:
            raise InputError(where, f"got {problem}", FLOAT_MODEL)
    linears = {layer: _linear(layer, settings.group_size, tensors) for layer in tensors.layers("B")}
    return Stored(linears, {f"{layer}.{end}" for layer in linears for end in _ENDS})


def _linear(layer: str, group_size: int, tensors: Tensors) -> StoredLinear:
    tiles, words = tensors.shape(layer, "B", (None, None))
    columns, rows = tiles * _TILE_K, words // 2
    if rows % _TILE_N:
        raise InputError(
            f"{tensors.place(layer)}.B",
            f"got {rows} output channels, expected a multiple of {_TILE_N}",
            "The checkpoint is damaged: download it again",
        )
    group = 0 if group_size in (-1, columns) else group_size
    tensors.shape(layer, "s_channel", (1, rows))
    if group:
        tensors.shape(layer, "s_group", (columns // group, rows))
    elif 0 not in (found := tensors.shapes.get(f"{layer}.s_group", (0,))):
        raise InputError(
            f"{tensors.place(layer)}.s_group",
            f"got scales of groups, {list(found)}, expected none by group_size {group_size} of the "
            "config",
            f"Correct group_size: {_GROUP}",
        )
    form = Form(code_set(_BITS, False), group, True, False, _op(), _ABITS, True)
    arrays = partial(_arrays, tensors, layer, form, (rows, columns))
    return StoredLinear(tensors.place(layer), (rows, columns), form, arrays)


def _arrays(tensors: Tensors, layer: str, form: Form, shape: tuple[int, int]) -> QuantArrays:
    rows, columns = shape
    attrs = GemmAttributes(
        wbits=_BITS,
        levels=form.codes.levels,
        abits=_ABITS,
        act_symmetric=1,
        group_size=form.group_size,
        in_features=columns,
        out_features=rows,
        has_bias=0,
    )
    channel = _in_order(tensors.scales(layer, "s_channel"), _CHANNELS)
    found = {"weight": tensors.integers(layer, "B")}
    if form.group_size:
        found |= {
            "scale": channel.T,
            "scale_group": _in_order(tensors.scales(layer, "s_group"), _GROUPED).astype(np.float16),
        }
    else:
        found["scale"] = channel.T * _SIXTEEN
    return op_spec(_op()).unpack(found, attrs)


def _in_order(stored: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """[n, N] as stored -> the same by output channel."""
    blocks = stored.reshape(len(stored), -1, len(channels))
    found = np.empty_like(blocks)
    found[:, :, channels] = blocks
    return found.reshape(stored.shape)
