"""Writes a quantised model as a Hugging Face folder in the compressed-tensors format, which
transformers and others open, and reads such folders.

The layout is that of the Python package compressed-tensors (0.15 to 0.20 read the same from it):
weights with integer activations are "int-quantized" (one int8 per weight), weights alone
"pack-quantized" (low bits first in int32 words). Only widths that divide 32 are written: the
package has changed how it packs the others. Floats of 4 bits ("mxfp4-pack-quantized" and
"nvfp4-pack-quantized"), two to a byte with the low bits first, are read alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
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
from calibration.checkpoints.fp4 import FP4_BITS, FP4_CODES, FP4_ZERO, half_scales
from calibration.checkpoints.safetensors import SafetensorsWriter, TensorSpec, read_header
from calibration.out.files import write_json
from calibration.out.json_file import checked
from calibration.quant.folder import QuantModel
from calibration.quant.scheme import FLOAT_BITS
from plugins import op_spec
from plugins.core.code_sets import code_set
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError
from plugins.text import shown, some

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.checkpoints.codes import Tensors
    from calibration.families import Decoder
    from calibration.quant.scheme import QuantLinear, QuantScheme
    from plugins.core.op_spec import AffineForm

__all__ = ["NAME", "check", "pack_words", "read", "write"]

_Tensor = tuple[TensorSpec, Callable[[], np.ndarray]]  # made when its turn comes

NAME = "compressed-tensors"
_WEIGHT_BITS, _ACTIVATION_BITS, _WEIGHT_ONLY = (4, 8), (8, 16), 16
_INT8, _INT32, _INT64, _FP32 = (np.dtype(name) for name in ("int8", "int32", "int64", "float32"))
_RTOL = 1e-5  # powers in fp32 differ by less, other frequencies by more
_STAY = "or leave out --format"


def check(scheme: QuantScheme, checkpoint: Checkpoint | None = None) -> None:
    """Raise InputError if the format cannot say this scheme or, where it is given, this model."""
    _check_scheme(scheme, f"--format {NAME}")
    if checkpoint is not None:
        _check_names(checkpoint.decoder, checkpoint.name)
        _check_rope(
            checkpoint.hf_config(),
            checkpoint.decoder,
            lambda name: checkpoint.rope(name)[0],
            checkpoint.name,
        )


def _check_scheme(scheme: QuantScheme, where: str) -> None:
    if scheme.balanced or scheme.wbits not in _WEIGHT_BITS or scheme.abits not in _ACTIVATION_BITS:
        raise InputError(
            where,
            f"got {scheme.gemm.title}, expected W4A8, W8A8, W4A16 or W8A16",
            f"Use such bits, {_STAY}",
        )
    if op_spec(scheme.op).affine(scheme.gemm) is None:
        raise InputError(
            where,
            f"got the op {scheme.op}, expected one whose weights are scale * (code - zero point)",
            f"Use other bits or groups, {_STAY}",
        )
    if scheme.kv_bits < FLOAT_BITS:
        raise InputError(
            where,
            f"got a KV cache of {scheme.kv_bits} bits, expected {FLOAT_BITS}: the format has no "
            f"word for ours",
            f"Leave out --kv-bits, {_STAY}",
        )


def _check_names(decoder: Decoder, where: str) -> None:
    """Whoever reads the format expects the tensors of this family's checkpoints, one by one."""
    if decoder.fused:
        raise InputError(
            where,
            f"got a family whose checkpoints hold several linears in one tensor such as "
            f"{decoder.fused[0]}, expected one tensor for each linear for --format {NAME}",
            "Leave out --format",
        )
    if decoder.routers:  # which transformers stacks before it looks for codes
        raise InputError(
            where,
            f"got a mixture of experts, whose folder transformers would not open, expected a model "
            f"without experts for --format {NAME}",
            "Leave out --format",
        )


def _check_rope(
    config: dict[str, Any], decoder: Decoder, tensor: Callable[[str], np.ndarray], where: str
) -> None:
    """A GGUF file may divide the frequencies by a tensor of its own, for which config.json has no
    word.
    """
    for name, (step, _) in decoder.frequencies.items():
        frequencies, rope = tensor(name), config["rope_parameters"]
        rope = rope[step.table] if step.table else rope
        if rope["rope_type"] not in ("default", "linear"):
            continue  # made from the config, by transformers
        exponents = -np.arange(len(frequencies)) / len(frequencies)
        expected = rope["rope_theta"] ** exponents / (
            rope["factor"] if rope["rope_type"] == "linear" else 1.0
        )
        if not np.allclose(frequencies, expected, rtol=_RTOL, atol=0):
            raise InputError(
                where,
                f"got rotary frequencies that do not follow from rope_type {rope['rope_type']}, "
                f"expected those of config.json for --format {NAME}",
                f"Give the model as a Hugging Face folder, {_STAY}",
            )


# ---------------------------------------------------------------- config.json


def _quantization_config(floats: Iterable[str], linears: Iterable[QuantLinear]) -> dict[str, Any]:
    """One group for each scheme, with the layers that have it; `floats` stay as they are."""
    members: dict[QuantScheme, list[str]] = {}
    for linear in linears:
        members.setdefault(linear.scheme, []).append(linear.name)
    groups = {
        f"group_{index}": _group(scheme) | {"targets": names if len(members) > 1 else ["Linear"]}
        for index, (scheme, names) in enumerate(members.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": NAME,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [*floats],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _affine(scheme: QuantScheme) -> AffineForm:
    form = op_spec(scheme.op).affine(scheme.gemm)
    assert form is not None  # _check_scheme refuses such an op
    return form


def _group(scheme: QuantScheme) -> dict[str, Any]:
    form = _affine(scheme)
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "dynamic": False,
        "strategy": "group" if form.group_size else "channel",
        "group_size": form.group_size or None,
    }
    activations = {
        "num_bits": scheme.abits,
        "type": "int",
        "symmetric": scheme.act_symmetric,
        "dynamic": True,
        "strategy": "token",
        "group_size": None,
    }
    if scheme.abits == _WEIGHT_ONLY:
        return {
            "format": "pack-quantized",
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "format": "int-quantized",
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }


# ---------------------------------------------------------------- tensors


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, columns] of 4 or 8 bits, 0 to 2^bits - 1, in int32 words [rows, ceil(columns *
    bits / 32)], low bits first.
    """
    per_word = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // per_word) * per_word), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return (padded[:, ::2] | padded[:, 1::2] << 4 if bits == 4 else padded).view("<i4")


def _linear_tensors(linear: QuantLinear) -> Iterator[_Tensor]:
    """The tensors of a layer; int8 codes and zero points are stored minus half the number of codes
    (symmetric codes as they are), packed ones plus half, which is from 0.

    Raises:
        InputError: the format cannot say its scheme or its zero points.
    """
    name, scheme, arrays = linear.name, linear.scheme, linear.arrays
    _check_scheme(scheme, name)
    form, (rows, columns), groups = _affine(scheme), arrays.codes.shape, arrays.scale.shape[1]
    bits, zero = form.bits, arrays.zero
    packed = scheme.abits == _WEIGHT_ONLY
    if packed:
        yield (
            TensorSpec(f"{name}.weight_packed", _INT32, (rows, -(-columns * bits // 32))),
            lambda: pack_words(_uncentred(_signed(linear, form), bits), bits),
        )
        yield TensorSpec(f"{name}.weight_shape", _INT64, (2,)), lambda: np.array((rows, columns))
    else:
        yield TensorSpec(f"{name}.weight", _INT8, (rows, columns)), lambda: _signed(linear, form)
    yield TensorSpec(f"{name}.weight_scale", _FP32, (rows, groups)), lambda: arrays.scale
    if not form.symmetric:
        assert zero is not None  # see AffineForm
        _check_zero(zero, bits, name)
        if packed:  # along the output
            yield (
                TensorSpec(f"{name}.weight_zero_point", _INT32, (-(-rows * bits // 32), groups)),
                lambda: pack_words(zero.T, bits).T,
            )
        else:
            yield (
                TensorSpec(f"{name}.weight_zero_point", _INT8, (rows, groups)),
                lambda: _centred(zero.astype(np.uint8), bits),
            )
    if (bias := arrays.bias) is not None:
        yield TensorSpec(f"{name}.bias", _FP32, (rows,)), lambda: bias


def _check_zero(zero: np.ndarray, bits: int, name: str) -> None:
    low, high, largest = int(zero.min()), int(zero.max()), (1 << bits) - 1
    if low < 0 or high > largest:
        raise InputError(
            name,
            f"got zero points from {low} to {high}, expected 0 to {largest} for --format {NAME}",
            f"Use --group-size 0 or larger groups, {_STAY}",
        )


def _signed(linear: QuantLinear, form: AffineForm) -> np.ndarray:
    """int8 [N, K]."""
    if form.symmetric:
        return linear.integers()[0].astype(np.int8)
    return _centred(linear.arrays.codes, form.bits)


def _centred(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes - np.uint8(1 << bits - 1)).view(
        np.int8
    )  # uint8 wraps around where int8 goes below 0


def _uncentred(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes.view(np.uint8) + np.uint8(1 << bits - 1)


def _as_stored(quant: QuantModel, name: str) -> np.ndarray:
    """A tensor as a checkpoint of this family has it: some store gain - 1."""
    array, info = quant.tensor(name), quant.decoder.infos.get(name)
    if info is None or (info.factor, info.offset) == (1, 0):
        return array
    return ((array.astype(np.float32) - info.offset) / info.factor).astype(array.dtype)


def _shard_tensors(
    quant: QuantModel, names: Iterable[str], linears: dict[str, QuantLinear]
) -> Iterator[_Tensor]:
    for name in names:
        layer, _, part = name.rpartition(".")
        if part == "codes":
            yield from _linear_tensors(linears[layer])
        # The frequencies follow from the config.
        elif layer not in linears and name not in quant.decoder.frequencies:
            array = quant.tensor(name)
            yield TensorSpec(name, array.dtype, array.shape), partial(_as_stored, quant, name)


# ---------------------------------------------------------------- the folder


def _generation(quant: QuantModel) -> dict[str, Any]:
    """How text is to be made, where config.json does not say it all; {} where it does."""
    config, ends = quant.config["hf"], quant.config["eos_token_id"]
    sampling = quant.config.get("sampling", {})
    if not sampling and ends == config.get("eos_token_id"):
        return {}
    tokens = {name: config.get(name) for name in ("bos_token_id", "pad_token_id")}
    return {**tokens, "eos_token_id": ends, **sampling}


def write(quant: QuantModel, folder: Path) -> None:
    """Write config.json, weight files that are cut as those of the quant folder, their index, and
    copies of all other files.

    One tensor at a time is in memory.

    Args:
        quant: the finished quant folder.
        folder: an empty folder.

    Raises:
        InputError: the format cannot say the model's tensors, a layer's scheme or zero points, or
            the rotary frequencies.
    """
    config, where = quant.config["hf"], str(quant.source["name"])
    _check_names(quant.decoder, where)
    _check_rope(config, quant.decoder, quant.tensor, where)
    names = {
        file: list(read_header(quant.path / file))
        for file in sorted(quant.files)
        if file.endswith(".safetensors")
    }
    layers = [
        name.removesuffix(".codes")
        for shard in names.values()
        for name in shard
        if name.endswith(".codes")
    ]
    linears = {layer: quant.linear(layer) for layer in layers}
    planned = {
        file: list(_shard_tensors(quant, shard, linears)) for file, shard in names.items()
    }  # checks before it writes
    shards = {
        file: tensors for file, tensors in planned.items() if tensors
    }  # the last may have held the frequencies alone
    for file, tensors in shards.items():
        with SafetensorsWriter(folder / file, [spec for spec, _ in tensors]) as writer:
            for _, make in tensors:
                writer.write(make())
    weight_map = {spec.name: file for file, tensors in shards.items() for spec, _ in tensors}
    size = sum(spec.nbytes for tensors in shards.values() for spec, _ in tensors)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )
    write_json(
        folder / "config.json",
        config
        | {
            "architectures": [quant.family.architecture],
            "dtype": quant.scheme.dtype,
            "quantization_config": _quantization_config(
                (quant.decoder.head.name, *quant.decoder.floats), linears.values()
            ),
        },
    )
    if generation := _generation(quant):
        write_json(folder / "generation_config.json", generation)
    for name in quant.files.keys() - names.keys():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)  # chat templates may lie deeper
        shutil.copyfile(quant.path / name, folder / name)


# ---------------------------------------------------------------- reading

_PACKED, _INT = "pack-quantized", "int-quantized"
_PACKED_BITS = (2, 4, 8)
_STRATEGIES = ("tensor", "channel", "group")
_IN_GROUPS = (True, "group", "dynamic")  # values of actorder with channels of a group anywhere
_DENSE = "dense"  # no zeros are left out
_MXFP4, _NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
_FP4_GROUPS = {_MXFP4: 32, _NVFP4: 16}
_NO_NUMBER = 255  # of e8m0
_OF_CODES = ("weight_scale", "weight_zero_point", "weight_g_idx")
_ENDS = {  # a layer's tensors; of activations there is nothing to be taken over
    _PACKED: ("weight_packed", "weight_shape", *_OF_CODES),
    _INT: ("weight", *_OF_CODES),
    _MXFP4: ("weight_packed", "weight_scale", "input_global_scale"),
    _NVFP4: ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


@dataclass(frozen=True)
class _Numbers:
    """How weights or activations are rounded."""

    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None


@dataclass(frozen=True)
class _Group:
    """The settings of some layers."""

    targets: list[str]
    weights: _Numbers
    input_activations: _Numbers | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


@dataclass(frozen=True)
class _Config:
    """What is read of a quantization_config."""

    config_groups: dict[str, _Group]
    format: str


def read(config: Mapping[str, Any], tensors: Tensors) -> Stored:
    """The layers of a checkpoint.

    Raises:
        InputError: settings that are none or that cannot be read, and tensors that do not fit them.
    """
    where = f"{tensors.where}, quantization_config"
    settings = checked(dict(config), _Config, where, "Correct the config")
    _check_whole(config, where)
    linears, used, warnings = {}, set(), dict[str, None]()
    for layer in tensors.layers("weight_scale"):
        name, group = _group_of(layer, settings, where)
        place, form = f"{where}, {name}", group.format or settings.format
        if form in _FP4_GROUPS:
            _check_fp4(group, form, place)
            linears[layer] = _stored_fp4(layer, form, tensors)
            warnings |= dict.fromkeys(_left_in_floats(group))
        else:
            _check_group(group, form, place)
            linears[layer] = _stored(layer, group, form == _PACKED, tensors)
        used |= {f"{layer}.{end}" for end in _ENDS[form]}
    return Stored(linears, used, warnings=[*warnings])


def _check_whole(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that asks for more than codes."""
    sparse, turned = config.get("sparsity_config"), config.get("transform_config")
    dense = isinstance(sparse, Mapping) and sparse.get("format") == _DENSE
    if sparse and not dense:
        raise InputError(where, "got a sparsity_config, expected none", FLOAT_MODEL)
    if turned and not (isinstance(turned, Mapping) and turned.get("config_groups") == {}):
        raise InputError(
            where,
            "got a transform_config, whose rotations of activations no graph here has, expected none",
            FLOAT_MODEL,
        )


def _group_of(layer: str, settings: _Config, where: str) -> tuple[str, _Group]:
    """A layer's settings: of those that name it, else of a pattern, else of all linears."""
    fits: list[Callable[[str], bool]] = [
        lambda target: target == layer,
        lambda target: target.startswith("re:") and _matches(target[3:], layer, where),
        lambda target: target == "Linear",
    ]
    for fit in fits:
        for name, group in settings.config_groups.items():
            if any(map(fit, group.targets)):
                return name, group
    raise InputError(
        where,
        f"got no group for {shown(layer)} among {some(list(settings.config_groups)) or 'none'}, "
        f"expected one that has it among its targets",
        "Correct the config",
    )


def _matches(pattern: str, layer: str, where: str) -> bool:
    try:
        return re.match(pattern, layer) is not None
    except re.error as error:
        raise InputError(
            where,
            f"got the target {shown(f're:{pattern}')}, which is no regular expression ({error})",
            "Correct the config",
        ) from None


def _check_group(group: _Group, form: str, where: str) -> None:
    weights, activations = group.weights, group.input_activations
    bits = _PACKED_BITS if form == _PACKED else range(2, 9)
    problems = {
        f"format {shown(form)}, expected one of {', '.join(_ENDS)}": form in _ENDS,
        f"weights of type {shown(weights.type)}, expected int": weights.type == "int",
        f"weights of {weights.num_bits} bits, expected {', '.join(map(str, bits))}": weights.num_bits
        in bits,
        f"weights by strategy {shown(weights.strategy)}, expected one of "
        f"{', '.join(_STRATEGIES)}": weights.strategy in _STRATEGIES,
        f"group_size {weights.group_size}, expected a number above 0": weights.strategy != "group"
        or (weights.group_size or 0) > 0,
        "output_activations, expected none": not group.output_activations,
    }
    if activations is not None:
        problems[f"activations of type {shown(activations.type)}, expected int"] = (
            activations.type == "int"
        )
        problems[f"activations of {activations.num_bits} bits, expected 2 to 8"] = (
            2 <= activations.num_bits <= 8
        )
        problems["activations that are not rounded per token (dynamic), expected such"] = (
            activations.dynamic is True and activations.strategy == "token"
        )
    _refuse(problems, where)


def _check_fp4(group: _Group, form: str, where: str) -> None:
    weights, size = group.weights, _FP4_GROUPS[form]
    _refuse(
        {
            f"weights of type {shown(weights.type)}, expected float": weights.type == "float",
            f"weights of {weights.num_bits} bits, expected 4": weights.num_bits == 4,
            f"group_size {weights.group_size}, expected {size}": weights.group_size == size,
            "weights with zero points (symmetric false), expected none": weights.symmetric,
            f"actorder {shown(str(weights.actorder))}, expected input channels in order": (
                weights.actorder not in _IN_GROUPS
            ),
            "output_activations, expected none": not group.output_activations,
        },
        where,
    )


def _left_in_floats(group: _Group) -> Iterator[str]:
    """What is said of activations that the checkpoint was made to round to floats."""
    if (seen := group.input_activations) is not None:
        yield (
            f"The checkpoint was made for activations of {seen.num_bits}-bit {seen.type} numbers, "
            "which no op here has: --abits says how they are rounded."
        )


def _refuse(problems: Mapping[str, bool], where: str) -> None:
    """Raise InputError for the first of them that is not fine."""
    for problem, fine in problems.items():
        if not fine:
            raise InputError(where, f"got {problem}", FLOAT_MODEL)


def _stored_fp4(layer: str, form: str, tensors: Tensors) -> StoredLinear:
    rows, bytes_of_row = tensors.shape(layer, "weight_packed", (None, None))
    columns, size = 2 * bytes_of_row, _FP4_GROUPS[form]
    tensors.shape(layer, "weight_scale", (rows, -(-columns // size)))
    if form == _NVFP4:
        tensors.shape(layer, "weight_global_scale", (1,))
    smaller = gcd(size, columns)  # of a last group that is cut short
    said = Form(code_set(FP4_BITS, False), 0 if smaller == columns else smaller)
    arrays = partial(_fp4_arrays, tensors, layer, form, (size, smaller, columns))
    return StoredLinear(tensors.place(layer), (rows, columns), said, arrays)


def _fp4_arrays(
    tensors: Tensors, layer: str, form: str, groups: tuple[int, int, int]
) -> QuantArrays:
    packed = tensors.integers(layer, "weight_packed", "uint8")
    codes = np.empty((len(packed), groups[2]), np.uint8)
    codes[:, ::2], codes[:, 1::2] = FP4_CODES[packed & 15], FP4_CODES[packed >> 4]
    half = (_mxfp4_halves if form == _MXFP4 else _nvfp4_halves)(tensors, layer)
    scale = np.ascontiguousarray(regrouped(half, *groups))
    return QuantArrays(codes, scale, np.full(scale.shape, FP4_ZERO, np.int32))


def _mxfp4_halves(tensors: Tensors, layer: str) -> np.ndarray:
    """Half of each group's scale, a power of two."""
    exponents = tensors.integers(layer, "weight_scale", "uint8")
    if (exponents == _NO_NUMBER).any():
        raise InputError(
            f"{tensors.place(layer)}.weight_scale",
            f"got the exponent {_NO_NUMBER}, which stands for no number, expected 0 to 254",
            "The checkpoint is damaged: download it again",
        )
    return half_scales(exponents)


def _nvfp4_halves(tensors: Tensors, layer: str) -> np.ndarray:
    """Half of each group's scale, an fp8 number over the fp32 one of the tensor."""
    scale = tensors.integers(layer, "weight_scale", "float8_e4m3fn").astype(np.float32)
    if np.isnan(scale).any():
        raise InputError(
            f"{tensors.place(layer)}.weight_scale",
            "got the scale nan, expected numbers",
            "The checkpoint is damaged: download it again",
        )
    scale /= tensors.scales(layer, "weight_global_scale")
    scale /= np.float32(2)
    return scale


def _stored(layer: str, group: _Group, packed: bool, tensors: Tensors) -> StoredLinear:
    weights, place = group.weights, tensors.place(layer)
    if packed:
        tensors.shape(layer, "weight_shape", (2,))
        shape = tensors.weights.array(f"{layer}.weight_shape")
        rows, columns = shape.tolist()
        if shape.dtype.kind != "i" or min(rows, columns) < 1:
            raise InputError(
                f"{place}.weight_shape",
                f"got {rows} x {columns} weights, expected whole numbers above 0",
                "The checkpoint is damaged: download it again",
            )
        tensors.shape(layer, "weight_packed", (rows, -(-columns * weights.num_bits // 32)))
    else:
        rows, columns = tensors.shape(layer, "weight", (None, None))
    size = min(weights.group_size or columns, columns) if weights.strategy == "group" else columns
    if weights.strategy == "tensor":
        tensors.shape(layer, "weight_scale", (1,))
    else:
        tensors.shape(layer, "weight_scale", (rows, -(-columns // size)))
    order = None
    if f"{layer}.weight_g_idx" in tensors.shapes:
        tensors.shape(layer, "weight_g_idx", (columns,))
        index = tensors.integers(layer, "weight_g_idx")
        if not (index == -1).all():  # as the package writes it where channels are in order
            order = sorted_by_group(index, size, f"{place}.weight_g_idx")
    elif weights.actorder in _IN_GROUPS and size < columns:
        raise InputError(
            place,
            "got no weight_g_idx, expected each input channel's group, as actorder of the config says",
            "The download is incomplete or damaged: download it again",
        )
    smaller = gcd(size, columns)  # of a last group that is cut short
    seen = group.input_activations
    form = Form(
        code_set(weights.num_bits, False),
        0 if smaller == columns else smaller,
        weights.symmetric,
        abits=None if seen is None else seen.num_bits,
        act_symmetric=None if seen is None else seen.symmetric,
    )
    arrays = partial(_stored_arrays, tensors, layer, weights, packed, order, (rows, columns, size))
    return StoredLinear(place, (rows, columns), form, arrays, order)


def _stored_arrays(
    tensors: Tensors,
    layer: str,
    weights: _Numbers,
    packed: bool,
    order: np.ndarray | None,
    sizes: tuple[int, int, int],
) -> QuantArrays:
    rows, columns, size = sizes
    bits, half = weights.num_bits, 1 << weights.num_bits - 1
    if packed:
        codes = unpack_words(tensors.integers(layer, "weight_packed").T, bits, columns).T
    else:
        signed = tensors.integers(layer, "weight", "int8")
        low, high = int(signed.min()), int(signed.max())
        if low < -half or high >= half:
            raise InputError(
                f"{tensors.place(layer)}.weight",
                f"got codes {low} to {high}, expected {-half} to {half - 1} of {bits} bits",
                "The config and the weights do not belong together",
            )
        codes = signed.view(np.uint8) + np.uint8(half)
    if order is not None:
        codes = codes[:, order]
    stored = tensors.scales(layer, "weight_scale").reshape(-1, -(-columns // size))
    scale = np.broadcast_to(stored, (rows, stored.shape[1]))  # one of all channels, too
    zero = np.full(scale.shape, half, np.int32)
    if not weights.symmetric:
        zero = _stored_zero(tensors, layer, bits, packed, scale.shape)
    elif f"{layer}.weight_zero_point" in tensors.shapes:
        _check_middle(tensors, layer, bits, rows)
    groups = (size, gcd(size, columns), columns)
    return QuantArrays(
        np.ascontiguousarray(codes),
        np.ascontiguousarray(regrouped(scale, *groups)),
        np.ascontiguousarray(regrouped(zero, *groups)),
    )


def _check_middle(tensors: Tensors, layer: str, bits: int, rows: int) -> None:
    """Zero points of symmetric codes, which say nothing: 0 among codes around it, or half the number
    of codes in words.
    """
    stored, middle = tensors.weights.array(f"{layer}.weight_zero_point"), 0
    if stored.dtype == np.int32:
        tensors.shape(layer, "weight_zero_point", (-(-rows * bits // 32), None))
        stored, middle = unpack_words(stored, bits, rows), 1 << bits - 1
    if (stored != middle).any():
        raise InputError(
            f"{tensors.place(layer)}.weight_zero_point",
            f"got other zero points than {middle}, expected none of symmetric codes",
            "Correct symmetric in the config",
        )


def _stored_zero(
    tensors: Tensors, layer: str, bits: int, packed: bool, shape: tuple[int, ...]
) -> np.ndarray:
    """Zero points [N, G] of codes from 0; packed along the output, or int8 around 0."""
    rows, groups = shape
    name = "weight_zero_point"
    if packed:
        tensors.shape(layer, name, (-(-rows * bits // 32), groups))
        return unpack_words(tensors.integers(layer, name), bits, rows).astype(np.int32)
    tensors.shape(layer, name, (rows, groups))
    return tensors.integers(layer, name, "int8").astype(np.int32) + (1 << bits - 1)
