"""The codes of quantized GGUF tensors as ABQGemm takes them, untouched: w = scale * (code - zero) or
w = scale * code + minimum, to the bit the fp32 numbers that the package gguf dequantizes.

Why to the bit: scales of blocks are fp16 (11 significant bits), scales of a super-block's groups
are whole numbers of at most 7, and codes have at most 8, so that every product is exact in fp32
(22 bits in Q5_K, 23 in Q6_K); what is left is one sum, rounded once on either side. Signed codes
become unsigned ones with a zero point, and floats of 4 bits the codes of fp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from calibration.checkpoints.foreign import DOWNLOAD_AGAIN
from calibration.checkpoints.fp4 import FP4_BITS, FP4_CODES, FP4_ZERO, half_scales
from calibration.checkpoints.gguf_header import GgufTensor
from plugins.errors import InputError

__all__ = ["Codes", "CodesForm", "form_of", "read_codes", "types_with_codes"]

_SLAB = 1 << 24  # codes unpacked together


@dataclass(frozen=True)
class CodesForm:
    """How the weights of a tensor are said.

    Attributes:
        bits: of the codes.
        group: input channels that share a scale.
        zero: the zero point of all groups; None where each has a minimum instead.
    """

    bits: int
    group: int
    zero: int | None


@dataclass(frozen=True)
class Codes:
    """A tensor's codes and what they stand for.

    Attributes:
        codes: uint8 [N, K], 0 to 2^bits - 1 at most.
        scale: fp32 [N, K / group]; may be negative or 0.
        zero: see CodesForm; then w = scale * (code - zero).
        minimum: fp32 [N, K / group] or None; then w = scale * code + minimum.
        bits, group: see CodesForm.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: int | None
    minimum: np.ndarray | None
    bits: int
    group: int


@dataclass(frozen=True)
class _Field:
    """Numbers of a few bits of a block: number i is in byte at[i], above shift[i] bits."""

    at: np.ndarray
    shift: np.ndarray
    bits: int

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """uint8 [..., numbers] of blocks [..., bytes]."""
        found = np.take(blocks, self.at, axis=-1)
        found >>= self.shift
        found &= np.uint8((1 << self.bits) - 1)
        return found


def _field(at: list[int] | np.ndarray, shift: int | np.ndarray, bits: int) -> _Field:
    places = np.asarray(at)
    return _Field(places, np.broadcast_to(np.uint8(shift), places.shape), bits)


def _runs(first: int, count: int, run: int, bits: int) -> _Field:
    """`count` numbers from byte `first` on, a run of bytes after the other, of each the low bits of
    every byte before the next higher ones.
    """
    number, parts = np.arange(count), 8 // bits
    chunk, place = np.divmod(number, run * parts)
    part, byte = np.divmod(place, run)
    return _field(first + chunk * run + byte, part * bits, bits)


@dataclass(frozen=True)
class _Layout:
    """A block of a type: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.

    Attributes:
        codes: fields that make a code, the low bits first.
        scale: byte of the block's fp16 scale.
        group: codes that share a scale.
        zero: as CodesForm.
        flip: bits to turn round, 128 where codes are two's complement.
        minimum: byte of the fp16 minimum of a block, or of the scale of its groups' minimums.
        scales: fields of the groups' scales, whole numbers that multiply the block's.
        centre: to be subtracted from these.
        minimums: fields of the groups' minimums, subtracted where a block's own is added.
        halves: the codes are floats of 4 bits, and each group has a byte from `scale` on that stands
            for half its scale: fp32 [256].
    """

    codes: tuple[_Field, ...]
    scale: int
    group: int
    zero: int | None = None
    flip: int = 0
    minimum: int = 0
    scales: tuple[_Field, ...] = ()
    scales_flip: int = 0
    centre: int = 0
    minimums: tuple[_Field, ...] = ()
    halves: np.ndarray | None = None

    @property
    def bits(self) -> int:
        """Of the codes."""
        return sum(field.bits for field in self.codes) if self.halves is None else FP4_BITS


def _numbers(fields: tuple[_Field, ...], blocks: np.ndarray) -> np.ndarray:
    """uint8 [..., numbers] of fields, the low bits first."""
    low, *rest = fields
    found, bits = low.of(blocks), low.bits
    for field in rest:
        more = field.of(blocks)
        more <<= np.uint8(bits)
        found |= more
        bits += field.bits
    return found


def _join(*parts: _Field) -> _Field:
    """Numbers of the same bits after each other."""
    at, shift = (np.concatenate([getattr(one, name) for one in parts]) for name in ("at", "shift"))
    return _Field(at, shift, parts[0].bits)


# Q4_K and Q5_K: 12 bytes from byte 4 on hold 8 scales and 8 minimums of 6 bits. The first four of
# each are the low bits of bytes 0 to 3 and 4 to 7; of the others the low nibbles are in bytes 8 to
# 11, scales below minimums, and the high bits above the first four.
def _six_bits(first: int, shift: int) -> tuple[_Field, _Field]:
    near, far = np.arange(first, first + 4), np.arange(12, 16)
    low = _join(_field(near, 0, 4), _field(far, shift, 4))
    return low, _join(_field(near, 4, 2), _field(near, 6, 2))


def _half_e4m3() -> np.ndarray:
    """Half of what gguf takes each byte for: e4m3 without a sign, its NaN as 0."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    whole = np.where(exponent == 0, fraction, 8 + fraction).astype(np.float32)
    half: np.ndarray = np.ldexp(whole, np.maximum(exponent, 1) - 11)
    half[0x7F] = 0
    return half


_SIX_BITS = _six_bits(4, 0), _six_bits(8, 4)
_Q = GGMLQuantizationType
_LAYOUTS = {
    _Q.Q4_0: _Layout((_runs(2, 32, 16, 4),), 0, 32, zero=8),
    _Q.Q4_1: _Layout((_runs(4, 32, 16, 4),), 0, 32, minimum=2),
    _Q.Q5_0: _Layout((_runs(6, 32, 16, 4), _runs(2, 32, 1, 1)), 0, 32, zero=16),
    _Q.Q5_1: _Layout((_runs(8, 32, 16, 4), _runs(4, 32, 1, 1)), 0, 32, minimum=2),
    _Q.Q8_0: _Layout((_runs(2, 32, 32, 8),), 0, 32, zero=128, flip=128),
    _Q.Q2_K: _Layout(
        (_runs(16, 256, 32, 2),),
        80,
        16,
        minimum=82,
        scales=(_field(np.arange(16), 0, 4),),
        minimums=(_field(np.arange(16), 4, 4),),
    ),
    _Q.Q3_K: _Layout(
        (_runs(32, 256, 32, 2), _runs(0, 256, 32, 1)),
        108,
        16,
        zero=4,
        scales=(_runs(96, 16, 8, 4), _runs(104, 16, 4, 2)),
        centre=32,
    ),
    _Q.Q4_K: _Layout(
        (_runs(16, 256, 32, 4),), 0, 32, minimum=2, scales=_SIX_BITS[0], minimums=_SIX_BITS[1]
    ),
    _Q.Q5_K: _Layout(
        (_runs(48, 256, 32, 4), _runs(16, 256, 32, 1)),
        0,
        32,
        minimum=2,
        scales=_SIX_BITS[0],
        minimums=_SIX_BITS[1],
    ),
    _Q.Q6_K: _Layout(
        (_runs(0, 256, 64, 4), _runs(128, 256, 32, 2)),
        208,
        16,
        zero=32,
        scales=(_runs(192, 16, 16, 8),),
        scales_flip=128,
        centre=128,
    ),
    _Q.MXFP4: _Layout(
        (_runs(1, 32, 16, 4),), 0, 32, zero=FP4_ZERO, halves=half_scales(np.arange(256))
    ),
    _Q.NVFP4: _Layout((_runs(4, 64, 8, 4),), 0, 16, zero=FP4_ZERO, halves=_half_e4m3()),
}


def types_with_codes() -> list[str]:
    """Names of the types whose codes are taken."""
    return [kind.name for kind in _LAYOUTS]


def form_of(where: str, tensor: GgufTensor) -> CodesForm:
    """How a tensor's weights are said; reads none of them.

    Args:
        where: the tensor, for messages.

    Raises:
        InputError: its type has no such form.
    """
    layout = _LAYOUTS.get(tensor.type)
    if layout is None:
        raise InputError(
            where,
            f"got type {tensor.type.name}, whose numbers are no scale * code + minimum, expected one "
            f"of {', '.join(types_with_codes())}",
            "Quantize its float numbers anew: --requantize",
        )
    return CodesForm(layout.bits, layout.group, layout.zero)


def read_codes(where: str, tensor: GgufTensor) -> Codes:
    """The codes of a tensor, or of some of its rows; memory beside them is that of a slab of rows.

    Args:
        where: the tensor, for messages.
        tensor: of two dimensions.

    Raises:
        InputError: its type has no such form, or it has scales that are not finite.
    """
    form, layout = form_of(where, tensor), _LAYOUTS[tensor.type]
    block, size = GGML_QUANT_SIZES[tensor.type]
    blocks = tensor.data.reshape(len(tensor.data), -1, size)  # [N, blocks of a row, bytes]
    rows, columns = len(blocks), blocks.shape[1] * block
    if layout.halves is not None:
        scale = layout.halves[blocks[..., layout.scale : layout.scale + block // layout.group]]
    else:
        scale = _halves(where, blocks, layout.scale)
    if layout.scales:
        numbers = _numbers(layout.scales, blocks) ^ np.uint8(layout.scales_flip)
        scale = scale * (numbers.astype(np.float32) - np.float32(layout.centre))
    minimum = None
    if form.zero is None:
        minimum = _halves(where, blocks, layout.minimum)
        if layout.minimums:
            minimum = -(minimum * _numbers(layout.minimums, blocks).astype(np.float32))
        minimum = minimum.reshape(rows, -1)
    codes = np.empty((rows, columns), np.uint8)
    step = max(1, _SLAB // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = _numbers(layout.codes, blocks[part]) ^ np.uint8(layout.flip)
        codes[part] = (found if layout.halves is None else FP4_CODES[found]).reshape(-1, columns)
    return Codes(codes, scale.reshape(rows, -1), form.zero, minimum, form.bits, form.group)


def _halves(where: str, blocks: np.ndarray, byte: int) -> np.ndarray:
    """The fp16 numbers at a byte of every block, as fp32 [N, blocks of a row, 1]."""
    halves = np.ascontiguousarray(blocks[..., byte : byte + 2]).view("<f2").astype(np.float32)
    bad = np.argwhere(~np.isfinite(halves))
    if len(bad):
        row, place, _ = bad[0]
        raise InputError(
            where,
            f"got the scale {halves[row, place, 0]} in block {place} of row {row} and {len(bad)} such "
            "in all, expected finite numbers",
            DOWNLOAD_AGAIN,
        )
    return halves
