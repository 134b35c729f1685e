"""The sets of weight codes that there are, in one table: a new one is a row of it."""

from __future__ import annotations

from dataclasses import dataclass

from plugins.errors import InputError

__all__ = ["CODE_SETS", "CodeSet", "code_set", "levels_with", "parse_code_set", "set_choices"]


@dataclass(frozen=True)
class CodeSet:
    """Codes 0..levels-1 of a weight.

    Attributes:
        bits: nominal weight bits.
        levels: number of codes.
        balanced: whether it has an odd number of levels, as many on either side of 0; a number of
            bits has at most one set of either kind.
    """

    bits: int
    levels: int
    balanced: bool = False

    @property
    def label(self) -> str:
        """As in names of schemes and folders: "4", "2b"."""
        return f"{self.bits}{'b' if self.balanced else ''}"

    @property
    def title(self) -> str:
        """As in texts: "4", "2*"."""
        return f"{self.bits}{'*' if self.balanced else ''}"


CODE_SETS = (
    *(CodeSet(bits, 1 << bits) for bits in range(1, 9)),
    CodeSet(1, 3, balanced=True),  # "bit balance" of ABQ-LLM (arXiv 2408.08554)
    CodeSet(2, 5, balanced=True),
)
_BY_KIND = {(codes.bits, codes.balanced): codes for codes in CODE_SETS}
_BY_NAME = {name: codes for codes in CODE_SETS for name in (codes.label, codes.title)}
_PLAIN = [codes.bits for codes in CODE_SETS if not codes.balanced]
_BALANCED = [codes for codes in CODE_SETS if codes.balanced]


def code_set(bits: int, balanced: bool) -> CodeSet:
    """The set of these bits.

    Raises:
        InputError: there is none.
    """
    if (bits, balanced) not in _BY_KIND:
        title = CodeSet(bits, 0, balanced).title
        raise InputError(
            "weight bits", f"got {title}, expected {set_choices()}", "Choose other weight bits"
        )
    return _BY_KIND[bits, balanced]


def parse_code_set(text: str, where: str = "--wbits") -> CodeSet:
    """The set that a user means: "4", or "2*" or "2b" for the balanced one.

    Raises:
        InputError: there is no such set.
    """
    if text not in _BY_NAME:
        example = _BALANCED[-1]
        raise InputError(
            where,
            f"got {text!r}, expected {set_choices()}",
            f"Give one of these; in a shell write {example.label} or '{example.title}' for the "
            "balanced set",
        )
    return _BY_NAME[text]


def levels_with(bits: int) -> dict[int, CodeSet]:
    """The sets of these bits by their number of levels, the plain one first."""
    return {codes.levels: codes for codes in CODE_SETS if codes.bits == bits}


def set_choices() -> str:
    """Every set, for messages: "1 to 8, 1* (3 levels) or 2* (5 levels)"."""
    words = [f"{codes.title} ({codes.levels} levels)" for codes in _BALANCED]
    return f"{', '.join([f'{min(_PLAIN)} to {max(_PLAIN)}', *words[:-1]])} or {words[-1]}"
