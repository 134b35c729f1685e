"""How QQQGemm's weights lie in INT32 words; README.md draws it."""

from __future__ import annotations

from plugins.core.op_spec import GemmAttributes

__all__ = [
    "HIGHEST",
    "INT8_MAX",
    "LOWEST",
    "OFFSET",
    "TILE_K",
    "TILE_N",
    "nibble_order",
    "padded_shape",
]

TILE_K, TILE_N = 16, 64
LOWEST, HIGHEST = -8, 7  # codes
OFFSET = 8  # per group, nibbles hold code + 8
INT8_MAX = 127  # of the weights that the tensor core multiplies


def padded_shape(attrs: GemmAttributes) -> tuple[int, int]:
    """(N, K) rounded up to whole 64 x 16 tiles."""
    return -(-attrs.out_features // TILE_N) * TILE_N, -(-attrs.in_features // TILE_K) * TILE_K


def nibble_order(grouped: bool) -> list[tuple[int, int]]:
    """(b, r) held by nibble 0..7 of a word: output channel 8b + lane/4 of its 16, input channel
    4(lane%4) + r of its 16.

    Per channel the nibble of b=0 is the high half of byte r; per group even and odd r are apart,
    for the fp16 conversion (arXiv 2406.09904, layout as in the published kernel).
    """
    if grouped:
        return [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]
    return [(1 - e % 2, e // 2) for e in range(8)]
