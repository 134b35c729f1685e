"""Reads GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

The layout follows the packing in AutoGPTQ's and GPTQModel's own layers: codes as a stream of bits in
int32 words along the input, zero points alike along the output. Version 1 stores zero points less
1, of which it keeps the lowest bits; version 2 as they are. g_idx is each input channel's group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.checkpoints.codes import (
    FLOAT_MODEL,
    Form,
    Stored,
    StoredLinear,
    regrouped,
    sorted_by_group,
    unpack_words,
)
from calibration.out.json_file import checked
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from plugins.text import shown

if TYPE_CHECKING:
    from calibration.checkpoints.codes import Tensors

__all__ = ["CONFIG_FILE", "read"]

CONFIG_FILE = "quantize_config.json"  # where config.json of an older checkpoint says nothing
_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_ENDS = ("qweight", "qzeros", "scales", "g_idx")
# Mean of code - zero point over a layer, in steps: about 0 of weights, about 1 off if the zero
# points are of the other version.
_LIKELY = 0.5
_LOOKED_AT = 3  # layers
_FLOATS = "-:"  # in front of a pattern of layers that are not quantized


@dataclass(frozen=True)
class _Config:
    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    dynamic: dict[str, Any] | None = None
    pack_dtype: str = "int32"


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint.

    Raises:
        InputError: settings that are none or that cannot be read, and tensors that do not fit them.
    """
    where = f"{tensors.where}, quantization config"
    known = {key: value for key, value in config.items() if value is not None}
    if "checkpoint_format" not in known and "format" in known:
        known["checkpoint_format"] = known["format"]
    settings = checked(known, _Config, where, "Correct the config")
    _check(settings, where)
    linears = {layer: _linear(layer, settings, tensors) for layer in tensors.layers("qweight")}
    used = {f"{layer}.{end}" for layer in linears for end in _ENDS}
    # AutoGPTQ has written a bias for every layer.
    return Stored(linears, used, tensors.empty_biases(), list(_doubts(settings, linears)))


def _check(settings: _Config, where: str) -> None:
    listed = ", ".join(map(str, _BITS))
    problems = {
        f"bits {settings.bits}, expected {listed}": settings.bits in _BITS,
        f"group_size {settings.group_size}, expected -1 or a number above 0": settings.group_size
        == -1
        or settings.group_size > 0,
        f"checkpoint_format {shown(settings.checkpoint_format)}, expected "
        f"{' or '.join(_VERSIONS)}": settings.checkpoint_format in _VERSIONS,
        "other settings for some layers (dynamic), expected one for all": all(
            name.startswith(_FLOATS) for name in settings.dynamic or ()
        ),
        f"pack_dtype {shown(settings.pack_dtype)}, expected int32": settings.pack_dtype == "int32",
    }
    for problem, fine in problems.items():
        if not fine:
            raise InputError(where, f"got {problem}", FLOAT_MODEL)


def _linear(layer: str, settings: _Config, tensors: Tensors) -> StoredLinear:
    bits, place = settings.bits, tensors.place(layer)
    words, rows = tensors.shape(layer, "qweight", (None, None))
    columns = words * 32 // bits
    group = columns if settings.group_size == -1 else min(settings.group_size, columns)
    groups = -(-columns // group)
    tensors.shape(layer, "scales", (groups, rows))
    tensors.shape(layer, "qzeros", (groups, -(-rows * bits // 32)))
    order = None
    if f"{layer}.g_idx" in tensors.shapes:
        tensors.shape(layer, "g_idx", (columns,))
        order = sorted_by_group(tensors.integers(layer, "g_idx"), group, f"{place}.g_idx")
    elif settings.desc_act and groups > 1:
        raise InputError(
            place,
            "got no g_idx, expected each input channel's group, as desc_act of the config says",
            "The download is incomplete or damaged: download it again",
        )
    smaller = gcd(group, columns)  # of a last group that is cut short
    if order is not None and smaller != group:
        raise InputError(
            place,
            f"got channels in an order of their own in groups of {group}, which do not divide "
            f"{columns}, expected either alone",
            FLOAT_MODEL,
        )
    size = 0 if smaller == columns else smaller
    form = Form(code_set(bits, False), size, settings.sym)
    arrays = partial(_arrays, tensors, layer, settings, order, (group, smaller, columns))
    return StoredLinear(place, (rows, columns), form, arrays, order)


def _arrays(
    tensors: Tensors,
    layer: str,
    settings: _Config,
    order: np.ndarray | None,
    groups: tuple[int, int, int],
) -> QuantArrays:
    codes = unpack_words(tensors.integers(layer, "qweight"), settings.bits, groups[2])
    if order is not None:
        codes = codes[order]
    scale = regrouped(tensors.scales(layer, "scales").T, *groups)
    zero = regrouped(_zeros(tensors, layer, settings, scale.shape[0]), *groups)
    return QuantArrays(
        np.ascontiguousarray(codes.T),
        np.ascontiguousarray(scale),
        np.ascontiguousarray(zero, np.int32),
    )


def _zeros(tensors: Tensors, layer: str, settings: _Config, rows: int) -> np.ndarray:
    """Zero points [N, G].

    Raises:
        InputError: other than half the codes where the config says symmetric.
    """
    bits, version = settings.bits, _VERSIONS[settings.checkpoint_format]
    stored = unpack_words(tensors.integers(layer, "qzeros").T, bits, rows)
    zero = stored + np.uint8(2 - version) & np.uint8((1 << bits) - 1)
    middle = 1 << bits - 1
    if settings.sym and (zero != middle).any():
        others = (stored + np.uint8(version - 1) & np.uint8((1 << bits) - 1)) == middle
        why = (
            f", which version {3 - version} has in these tensors: the config's checkpoint_format is "
            f"wrong"
            if others.all()
            else ""
        )
        raise InputError(
            f"{tensors.place(layer)}.qzeros",
            f"got zero points from {zero.min()} to {zero.max()} by checkpoint_format "
            f"{settings.checkpoint_format}, expected {middle} of symmetric codes{why}",
            "Correct checkpoint_format (gptq is version 1, gptq_v2 is version 2) or sym in the config",
        )
    return zero


def _doubts(settings: _Config, linears: Mapping[str, StoredLinear]) -> Iterator[str]:
    """Nothing in the tensors of asymmetric codes says their version for certain: what weights are
    like on the average tells.
    """
    if settings.sym:
        return
    means = [_mean_step(linear.read()) for linear in islice(linears.values(), _LOOKED_AT)]
    mean, version = float(np.mean(means or [0.0])), _VERSIONS[settings.checkpoint_format]
    other = 1.0 if version == 2 else -1.0  # of code - zero point, if it is of the other version
    if abs(mean) > _LIKELY and abs(mean - other) < _LIKELY:
        yield (
            f"The weights are {mean:+.2f} steps off zero on the average: checkpoint_format "
            f"{settings.checkpoint_format} may be wrong. If the model writes nonsense, try "
            f"{'gptq' if version == 2 else 'gptq_v2'}."
        )


def _mean_step(arrays: QuantArrays) -> float:
    assert arrays.zero is not None
    return float(arrays.codes.mean() - arrays.zero.mean())
