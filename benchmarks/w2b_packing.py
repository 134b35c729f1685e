"""Five-level codes in the storages that benchmarks/w2b_storage.cu reads, and back, in numpy.

A warp's lane takes `parts` 16-byte parts in a step and makes `registers` registers of 4 codes of
them, so that codes are [rows, steps, 32 lanes, registers, 4] uint8 and packed weights [rows, steps,
parts, 32 lanes, 4 words] uint32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = ["LEVELS", "STORAGES", "Storage", "seven_bits"]

LEVELS = 5
_LANES = 32
_DIGITS = np.array(
    list(product(range(LEVELS), repeat=3)), np.uint8
)  # [125, 3], row v = 25 a + 5 b + c
_VALUES = np.array([25, 5, 1], np.uint8)


@dataclass(frozen=True)
class Storage:
    """One way to store five-level codes.

    Attributes:
        name: as run_w2b() knows it.
        label: as tables name it.
        parts, registers: of a lane and step.
        pack: packed weights of codes.
        unpack: the codes of packed weights.
    """

    name: str
    label: str
    parts: int
    registers: int
    pack: Callable[[np.ndarray], np.ndarray]
    unpack: Callable[[np.ndarray], np.ndarray]

    @property
    def step_codes(self) -> int:
        """Codes of a row in one step of its warp."""
        return _LANES * self.registers * 4

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 128 * self.parts / (4 * self.registers)

    def random_codes(self, rows: int, steps: int, seed: int) -> np.ndarray:
        """Codes [rows, steps, 32, registers, 4] uint8."""
        return np.random.default_rng(seed).integers(
            0, LEVELS, (rows, steps, _LANES, self.registers, 4), dtype=np.uint8
        )


def seven_bits(a: int, b: int, c: int) -> int:
    """The number m AA BB CC of three codes in `planes7`; w2b_storage.cu, Planes7::split() has the
    rule.
    """
    large = [code == LEVELS - 1 for code in (a, b, c)]
    if not any(large):
        return a << 4 | b << 2 | c
    if sum(large) == 1:
        fields = ((c, b, 2), (a, c, 1), (a, b, 0))[large.index(True)]
    else:
        small = large.index(False) if False in large else 3
        fields = (a, b, c, 0)[small], small, 3
    return 64 | fields[0] << 4 | fields[1] << 2 | fields[2]


_PLANES7 = np.array([seven_bits(*map(int, digits)) for digits in _DIGITS], np.uint8)  # by v
_V_OF_PLANES7 = np.zeros(128, np.uint8)
_V_OF_PLANES7[_PLANES7] = np.arange(LEVELS**3)


def _plane_words(values: np.ndarray, planes: int) -> np.ndarray:
    """Bit planes of values [..., 8 registers s, 4 bytes i]: words [..., planes] uint32, bit 8 i +
    s.
    """
    place = (8 * np.arange(4)[None, :] + np.arange(8)[:, None]).astype(np.uint32)
    words = [
        ((values >> j & 1).astype(np.uint32) << place).sum((-2, -1), dtype=np.uint32)
        for j in range(planes)
    ]
    return np.stack(words, -1)


def _values_of(words: np.ndarray) -> np.ndarray:
    """Inverse of _plane_words(): uint8 [..., 8, 4]."""
    place = (8 * np.arange(4)[None, :] + np.arange(8)[:, None]).astype(np.uint32)
    bits = words[..., None, None, :] >> place[..., None] & 1
    values: np.ndarray = (
        (bits << np.arange(words.shape[-1], dtype=np.uint32)).sum(-1).astype(np.uint8)
    )
    return values


def _to_parts(words: np.ndarray) -> np.ndarray:
    """Packed weights of words [rows, steps, 32, halves, 4 words of a part, parts of a half]."""
    rows, steps = words.shape[:2]
    return np.ascontiguousarray(words.transpose(0, 1, 3, 5, 2, 4)).reshape(
        rows, steps, -1, _LANES, 4
    )


def _from_parts(packed: np.ndarray, halves: int) -> np.ndarray:
    """Inverse of _to_parts()."""
    rows, steps = packed.shape[:2]
    return packed.reshape(rows, steps, halves, -1, _LANES, 4).transpose(0, 1, 4, 2, 5, 3)


def _pack_planes(codes: np.ndarray) -> np.ndarray:
    return _to_parts(_plane_words(codes.reshape(*codes.shape[:3], 2, 4, 8, 4), 3))


def _unpack_planes(packed: np.ndarray) -> np.ndarray:
    return _values_of(_from_parts(packed, 2)).reshape(*packed.shape[:2], _LANES, 64, 4)


def _pack_planes7(codes: np.ndarray) -> np.ndarray:
    digits = codes.reshape(
        *codes.shape[:3], 1, 4, 3, 8, 4
    )  # word of a part, digit, register s, byte i
    v = np.einsum("...dsi,d->...si", digits, _VALUES)
    return _to_parts(_plane_words(_PLANES7[v], 7))


def _unpack_planes7(packed: np.ndarray) -> np.ndarray:
    v = _V_OF_PLANES7[_values_of(_from_parts(packed, 1))]
    codes: np.ndarray = np.moveaxis(_DIGITS[v], -1, -3).reshape(*packed.shape[:2], _LANES, 96, 4)
    return codes


def _pack_base5(codes: np.ndarray) -> np.ndarray:
    digits = codes.reshape(
        *codes.shape[:3], 1, 4, 8, 3, 4
    )  # word of a part, number's word, digit, byte
    v = np.einsum("...di,d->...i", digits, _VALUES).astype(np.uint32)
    q = ((v * 128 + 124) // 125).astype(np.uint8)  # [..., 8, 4]: q / 128 is v / 125, rounded up
    eighth = np.zeros((*q.shape[:-2], 7, 4), np.uint8)  # of each byte of the 7 words
    for bit, word, turned in _SPARE:
        of_byte = q[..., 7, :] >> (bit - 1) & 1
        eighth[..., word, :] = np.roll(of_byte, -1, -1) if turned else of_byte
    low = np.array([1, 0, 1, 0, 1, 0, 0], np.uint8)[
        :, None
    ]  # where the eighth bit is the lowest one
    data = np.ascontiguousarray(
        np.where(low, q[..., :7, :] << 1 | eighth, q[..., :7, :] | eighth << 7).astype(np.uint8)
    )
    return _to_parts(data.view("<u4")[..., 0])


# The number in the eighth bits: its bit (from 1), the word that holds it, and whether it comes from
# the byte before (a rotation).
_SPARE = [
    (1, 3, True),
    (2, 2, False),
    (3, 5, True),
    (4, 4, False),
    (5, 1, True),
    (6, 0, False),
    (7, 6, False),
]


def _unpack_base5(packed: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(_from_parts(packed, 1))
    data = words.view(np.uint8).reshape(*words.shape, 4)  # [rows, steps, 32, 1, 4, 7, 4]
    low = np.array([1, 0, 1, 0, 1, 0, 0], np.uint8)[:, None]
    eighth, last = np.where(low, data & 1, data >> 7), np.zeros((*data.shape[:-2], 4), np.uint8)
    for bit, word, turned in _SPARE:
        last |= (np.roll(eighth[..., word, :], 1, -1) if turned else eighth[..., word, :]) << (
            bit - 1
        )
    q = np.concatenate([np.where(low, data >> 1, data & 127), last[..., None, :]], -2)
    digits = _DIGITS[q.astype(np.uint32) * 125 // 128]  # [..., 8, 4, 3]
    codes: np.ndarray = np.moveaxis(digits, -1, -2).reshape(*packed.shape[:2], _LANES, 96, 4)
    return codes


STORAGES = [
    Storage("planes", "3 planes", 6, 64, _pack_planes, _unpack_planes),
    Storage("planes3", "3 planes, shorter", 6, 64, _pack_planes, _unpack_planes),
    Storage("base5", "7 bits, multiplied", 7, 96, _pack_base5, _unpack_base5),
    Storage("planes7", "7 bits, 7 planes", 7, 96, _pack_planes7, _unpack_planes7),
]
