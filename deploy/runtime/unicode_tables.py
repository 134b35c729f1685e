"""Writes src/unicode_tables.inc: what characters are and how they are normalized, as Hugging Face's
tokenizers library sees them.

The library is asked itself, character by character, because it mixes versions of Unicode: that of
its regular expressions, of Rust's standard library and of its normalizers. Run as
`python deploy/runtime/unicode_tables.py`, with the version of tokenizers that the tokenizer in C++
is to agree with; it takes a minute or two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

# In the order of Category in src/unicode.hpp.
CATEGORIES = (
    *("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe"),
    *("Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn"),
)
WORD, NUMERIC, NOT_PLAIN = 0x20, 0x40, 0x80  # beside the category, which takes five bits
CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
HANGUL = {chr(code) for code in range(0xAC00, 0xD7A4)}  # computed, not listed
JAMO_AFTER = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}


def matches(pattern: str) -> set[str]:
    """Characters that a regular expression of one character matches."""
    split = pre_tokenizers.Split(Regex(f"{pattern}+"), "removed", invert=True)
    return {one for piece, _ in split.pre_tokenize_str("".join(CHARACTERS)) for one in piece}


def properties() -> dict[str, int]:
    """Category and flags of every character."""
    found = {
        one: index for index, name in enumerate(CATEGORIES) for one in matches(rf"\p{{{name}}}")
    }
    assert len(found) == len(CHARACTERS)
    # A digit alone is a piece; a letter and a character of a word are one.
    pieces = pre_tokenizers.Digits().pre_tokenize_str("a".join(CHARACTERS))
    numeric = {piece for piece, _ in pieces if len(piece) == 1 and piece != "a"}
    pairs = " ".join(f"a{one}!" for one in CHARACTERS)
    pieces = pre_tokenizers.Whitespace().pre_tokenize_str(pairs)
    word = {piece[1] for piece, _ in pieces if len(piece) == 2 and piece[0] == "a"}
    for flag, characters in ((NUMERIC, numeric), (WORD, word)):
        for one in characters:
            found[one] |= flag
    return found


def decompositions(form: str) -> dict[str, str]:
    """Characters that "NFD" or "NFKD" takes apart, but syllables of Hangul."""
    normalize = getattr(normalizers, form)().normalize_str
    return {
        one: parts for one in CHARACTERS if one not in HANGUL and (parts := normalize(one)) != one
    }


def combining_classes() -> dict[str, int]:
    """Those that the library orders marks by: of a later Unicode it knows none.

    A mark of class 1 after one of a higher class changes places with it.
    """
    low, normalize = "\u0334", normalizers.NFD().normalize_str
    return {
        one: kind
        for one in CHARACTERS
        if (kind := unicodedata.combining(one)) and (kind == 1 or normalize(one + low) != one + low)
    }


def compositions() -> dict[tuple[str, str], str]:
    """Pairs that NFC puts together, but those of Hangul."""
    normalize = normalizers.NFC().normalize_str
    found = {}
    for one in CHARACTERS:
        parts = unicodedata.decomposition(one)
        if parts and "<" not in parts and " " in parts:
            first, second = (chr(int(part, 16)) for part in parts.split())
            if normalize(first + second) == one:
                found[first, second] = one
    return found


def rows(numbers: Iterable[int]) -> str:
    """Numbers in lines of at most 100 columns."""
    lines, line = [], ""
    for number in numbers:
        text = f"{number},"
        if len(line) + len(text) > 100:
            lines.append(line)
            line = ""
        line += text
    return "\n".join([*lines, line])


def runs(values: dict[str, int]) -> list[int]:
    """A number for each change of value: first character << 8 | value."""
    numbers, before = [], -1
    for code in range(0x110000):
        value = values.get(chr(code), CATEGORIES.index("Cn"))
        if value != before:
            numbers.append(code << 8 | value)
            before = value
    return numbers


def listed(table: dict[str, str]) -> list[int]:
    """Each row as: character << 8 | length, and what it becomes."""
    return [
        number
        for one, parts in sorted(table.items())
        for number in (ord(one) << 8 | len(parts), *map(ord, parts))
    ]


def main() -> None:
    """Ask, and write the file."""
    values, canonical, compatible = properties(), decompositions("NFD"), decompositions("NFKD")
    classes, pairs = combining_classes(), compositions()
    # Where none of these stands, a text is NFC already.
    normalize = normalizers.NFC().normalize_str
    for one in {
        *(one for one in CHARACTERS if normalize(one) != one),
        *classes,
        *JAMO_AFTER,
        *(second for _, second in pairs),
    }:
        values[one] |= NOT_PLAIN
    tables = {
        "kProperties": runs(values),
        "kCanonical": listed(canonical),
        "kCompatible": listed({k: v for k, v in compatible.items() if canonical.get(k) != v}),
        "kClasses": [ord(one) << 8 | kind for one, kind in sorted(classes.items())],
        "kPairs": [
            number for (a, b), c in sorted(pairs.items()) for number in (ord(a), ord(b), ord(c))
        ],
    }
    text = "".join(
        f"const uint32_t {name}[] = {{\n{rows(numbers)}\n}};\n" for name, numbers in tables.items()
    )
    path = Path(__file__).parent / "src" / "unicode_tables.inc"
    path.write_text(
        f"// Made by deploy/runtime/unicode_tables.py with tokenizers {tokenizers.__version__}.\n{text}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
