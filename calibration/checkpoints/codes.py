"""What a checkpoint that is already quantized holds of a linear layer: integer codes, and the floats
that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from plugins import op_spec
from plugins.core.code_sets import CodeSet
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.errors import InputError
from plugins.text import shown

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.checkpoints.huggingface import Place, WeightSource

__all__ = [
    "FLOAT_MODEL",
    "GGUF",
    "Form",
    "Stored",
    "StoredFloats",
    "StoredLinear",
    "StoredWeights",
    "Tensors",
    "affine_weights",
    "regrouped",
    "sorted_by_group",
    "unpack_words",
]

GGUF = "gguf"  # the format of such files
FLOAT_MODEL = "Give the float model it was made from"
_CHUNK = 1 << 22  # weights held as fp32 together
_SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Form:
    """How the weights of a linear are stored.

    Attributes:
        codes: the set of codes, 0 to levels - 1.
        group_size: input channels that share a scale; 0 is per output channel.
        symmetric: every zero point is half the number of codes.
        minimum: w = scale * code + minimum, in the place of scale * (code - zero point).
        op: the only op whose arrays these are; "" stands for codes, scales and zero points, which
            any op may take that says the same numbers.
        abits: of the activations, if the checkpoint says so.
        act_symmetric: of their codes, if the checkpoint says so.
    """

    codes: CodeSet
    group_size: int = 0
    symmetric: bool = False
    minimum: bool = False
    op: str = ""
    abits: int | None = None
    act_symmetric: bool | None = None


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear of a checkpoint; its tensors are read when asked for.

    Attributes:
        where: file or folder and layer, for messages.
        shape: (out_features, in_features).
        form: how it is stored.
        read: its arrays: uint8 codes [N, K], scale fp32 [N, G] and zero int32 or minimum fp32
            [N, G], or those of form.op; raises InputError where they are damaged.
        order: the input channel of each column of the codes, int32 [K]; None where they are in
            order.
    """

    where: str
    shape: tuple[int, int]
    form: Form
    read: Callable[[], QuantArrays]
    order: np.ndarray | None = None

    def rows(self, part: slice) -> StoredLinear:
        """Some of its output channels as a linear of their own."""
        shape = (len(range(*part.indices(self.shape[0]))), self.shape[1])
        return replace(self, shape=shape, read=lambda: self.read().rows(part))

    def dequantized(self, rows: slice | None = None) -> np.ndarray:
        """The weights that the codes stand for, fp32 [N, K], their columns in order."""
        arrays = self.read()
        weight = affine_weights(arrays if rows is None else arrays.rows(rows), self.form)
        if self.order is None:
            return weight
        placed = np.empty_like(weight)
        placed[:, self.order] = weight
        return placed


@dataclass(frozen=True)
class StoredFloats:
    """A linear of a checkpoint that is stored in few bits but has no codes that an op takes.

    Attributes:
        shape: (out_features, in_features).
        read: its weights, fp32 [N, K]; raises InputError where tensors are damaged.
    """

    shape: tuple[int, int]
    read: Callable[[], np.ndarray]

    def dequantized(self, rows: slice | None = None) -> np.ndarray:
        """The weights, fp32 [N, K]."""
        weight = self.read()
        return weight if rows is None else weight[rows]


def affine_weights(arrays: QuantArrays, form: Form) -> np.ndarray:
    """fp32 [N, K], each product and each sum rounded once."""
    rows, columns = arrays.codes.shape
    if form.op:
        levels, group = form.codes.levels, form.group_size
        scheme = (form.codes.bits, levels, form.abits or 16, int(form.act_symmetric or 0), group)
        attrs = GemmAttributes(*scheme, columns, rows, 0)
        return op_spec(form.op).dequantize(replace(arrays, bias=None), attrs)
    weight = np.empty((rows, columns), np.float32)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scale = arrays.scale[part, :, None]
        groups = arrays.codes[part].reshape(*scale.shape[:2], -1).astype(np.float32)
        if arrays.minimum is not None:
            groups = groups * scale + arrays.minimum[part, :, None]
        else:
            assert arrays.zero is not None
            groups = (groups - arrays.zero[part, :, None].astype(np.float32)) * scale
        weight[part] = groups.reshape(-1, columns)
    return weight


def regrouped(array: np.ndarray, group: int, smaller: int, columns: int) -> np.ndarray:
    """What each group has, [N, ceil(K / group)], given to each of the smaller groups that it
    consists of: [N, K / smaller]. The last group may be cut short.
    """
    return np.repeat(array, group // smaller, axis=1)[:, : columns // smaller]


def sorted_by_group(index: np.ndarray, group: int, where: str) -> np.ndarray | None:
    """The order of the input channels [K] in which groups lie together, from each channel's group
    [K]; None where they do already.

    Raises:
        InputError: a group that there is not, or that is not as large as the others.
    """
    columns = len(index)
    count = -(-columns // group)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        raise InputError(
            where,
            f"got groups {low} to {high}, expected 0 to {count - 1} for {columns} input channels in "
            f"groups of {group}",
            "The checkpoint is damaged: download it again",
        )
    if np.array_equal(index, np.arange(columns) // group):
        return None
    sizes = np.bincount(index, minlength=count)
    wanted = np.minimum(group, columns - group * np.arange(count))
    if not np.array_equal(sizes, wanted):
        bad = int(np.flatnonzero(sizes != wanted)[0])
        raise InputError(
            where,
            f"got {sizes[bad]} input channels in group {bad}, expected {wanted[bad]}",
            "The checkpoint is damaged: download it again",
        )
    return np.argsort(index, kind="stable").astype(np.int32)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of 1 to 8 bits out of int32 words along the first axis, one after the other, low bits
    first: [ceil(count * bits / 32), ...] -> uint8 [count, ...]. A number may begin in one word and
    end in the next.
    """
    unsigned, mask = np.ascontiguousarray(words).view(np.uint32), (1 << bits) - 1
    period = 32 // math.gcd(32, bits)  # numbers after which the words begin anew
    step = bits * period // 32
    filled = -(-count // period) * period
    lacking = filled * bits // 32 - len(unsigned)
    if lacking:
        unsigned = np.concatenate([unsigned, np.zeros((lacking, *words.shape[1:]), np.uint32)])
    found = np.empty((filled, *words.shape[1:]), np.uint8)
    for place in range(period):
        word, shift = divmod(place * bits, 32)
        part = unsigned[word::step] >> shift
        if shift + bits > 32:
            part = part | unsigned[word + 1 :: step] << (32 - shift)
        found[place::period] = part & mask
    return found[:count]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a quantized checkpoint's layers, checked as they are read.

    Attributes:
        weights: the files.
        where: the folder, for messages.
    """

    weights: WeightSource
    where: str
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", self.weights.shapes())

    def layers(self, end: str) -> list[str]:
        """Names of the layers that have a tensor of this name, such as "qweight"."""
        return [name.removesuffix(f".{end}") for name in self.shapes if name.endswith(f".{end}")]

    def place(self, layer: str) -> str:
        """How messages call a layer."""
        return f"{self.where}, {shown(layer)}"

    def shape(self, layer: str, end: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
        """Of a layer's tensor that has to be there.

        Args:
            expected: None for a size that may be any above 0.

        Raises:
            InputError: it is not, or has another shape.
        """
        found = self.shapes.get(f"{layer}.{end}")
        if found is None:
            raise InputError(
                self.place(layer),
                f"got no {end}, expected it beside the layer's other tensors",
                "The download is incomplete or damaged: download it again",
            )
        fits = len(found) == len(expected) and all(
            got > 0 if want is None else got == want
            for got, want in zip(found, expected, strict=True)
        )
        if not fits:
            wanted = ", ".join("above 0" if size is None else str(size) for size in expected)
            raise InputError(
                f"{self.place(layer)}.{end}",
                f"got shape {list(found)}, expected [{wanted}] by the config's bits and group size",
                "The config and the weights do not belong together, or groups differ between "
                "layers: give the checkpoint as its makers' tool wrote it",
            )
        return found

    def integers(self, layer: str, end: str, dtype: str = "int32") -> np.ndarray:
        """A tensor of whole numbers, or of another type that is told.

        Raises:
            InputError: it has another type.
        """
        array = self.weights.array(f"{layer}.{end}")
        if array.dtype.name != dtype:
            raise InputError(
                f"{self.place(layer)}.{end}",
                f"got dtype {array.dtype.name}, expected {dtype}",
                "The checkpoint is damaged or of another format",
            )
        return array

    def numbers(self, layer: str, end: str, zeros: bool = True) -> np.ndarray:
        """A tensor of floats as fp32.

        Raises:
            InputError: it is not floating point, or has NaN or infinities, or zeros where there may
                be none.
        """
        stored, where = self.weights.array(f"{layer}.{end}"), f"{self.place(layer)}.{end}"
        if stored.dtype.name not in _SCALES:
            raise InputError(
                where,
                f"got dtype {stored.dtype.name}, expected one of {', '.join(_SCALES)}",
                "The checkpoint is damaged or of another format",
            )
        found = np.asarray(stored, np.float32)
        bad = np.argwhere(~np.isfinite(found) if zeros else ~np.isfinite(found) | (found == 0))
        if len(bad):
            raise InputError(
                where,
                f"got {found[tuple(bad[0])]} at {bad[0].tolist()} and {len(bad)} such in all, expected "
                f"finite numbers{'' if zeros else ' other than 0'}",
                "The checkpoint is damaged: download it again",
            )
        return found

    def scales(self, layer: str, end: str) -> np.ndarray:
        """A tensor of scales as fp32, none of which is 0. Raises as numbers."""
        return self.numbers(layer, end, zeros=False)

    def empty_biases(self) -> set[str]:
        """Names of biases of nothing but zeros, which some tools give to every layer."""
        return {
            name
            for name in self.shapes
            if name.endswith(".bias") and not np.asarray(self.weights.array(name), np.float32).any()
        }


@dataclass(frozen=True)
class Stored:
    """What a format reads of a checkpoint.

    Attributes:
        linears: the layers that are quantized, by name.
        used: the names of all tensors that they are made of.
        spare: the names of tensors that have no part in the result where the model has none such.
        warnings: what is odd about them, a line each.
    """

    linears: Mapping[str, StoredLinear | StoredFloats]
    used: Collection[str]
    spare: Collection[str] = ()
    warnings: Sequence[str] = ()


class StoredWeights:
    """A quantized checkpoint's weights under the names of its float model: layers with codes read
    as the floats that these stand for.

    Attributes:
        format: in which the codes are stored, as calibration/formats calls it.
        settings: what the checkpoint says of them.
        spare: as of Stored.
        warnings: what is odd about them, a line each.
    """

    def __init__(
        self, weights: WeightSource, format: str, settings: Mapping[str, Any], stored: Stored
    ) -> None:
        self._weights, self.format, self.settings = weights, format, settings
        self._linears = stored.linears
        self.spare, self.warnings = stored.spare, stored.warnings
        self._shapes = {
            name: shape for name, shape in weights.shapes().items() if name not in stored.used
        } | {f"{name}.weight": linear.shape for name, linear in stored.linears.items()}

    @property
    def files(self) -> list[Path]:
        """The weight files, in name order."""
        return self._weights.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the float model."""
        return self._shapes

    def _stored(self, name: str) -> StoredLinear | StoredFloats | None:
        layer, _, end = name.rpartition(".")
        return self._linears.get(layer) if end == "weight" else None

    def coded(self, name: str) -> StoredLinear | None:
        """The codes of a weight; None of one that is stored as floats."""
        found = self._stored(name)
        return found if isinstance(found, StoredLinear) else None

    def plain(self, name: str) -> bool:
        """Whether a weight is stored in floating point."""
        return self._stored(name) is None

    def array(self, name: str, rows: Place | None = None) -> np.ndarray:
        """One tensor, or a part of it, in its stored type; of codes fp32."""
        stored = self._stored(name)
        if stored is None:
            return self._weights.array(name, rows)
        assert not isinstance(rows, tuple), "codes are those of matrices"
        return stored.dequantized(rows)
