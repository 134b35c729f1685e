"""How ABQGemm's weights lie in INT32 words; README.md draws it."""

from __future__ import annotations

from plugins.core.op_spec import GemmAttributes

__all__ = ["ROW_ALIGNMENT", "WEIGHT_ONLY", "WORD", "padded_group", "row_words"]

WORD = 32
ROW_ALIGNMENT = 4  # words: rows start at 16-byte addresses
WEIGHT_ONLY = 16  # activation bits that mean: X stays in floating point


def padded_group(attrs: GemmAttributes) -> int:
    """Bits of a group in a plane: whole words."""
    return -(-attrs.group_len // WORD) * WORD


def row_words(attrs: GemmAttributes) -> int:
    """INT32 words of one weight row of one plane: groups padded to whole words, rows to 16 bytes."""
    words = attrs.n_groups * (padded_group(attrs) // WORD)
    return -(-words // ROW_ALIGNMENT) * ROW_ALIGNMENT
