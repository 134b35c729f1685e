"""Text from elsewhere is shown without anything that a terminal would obey."""

from __future__ import annotations

import pickle
import sys
import unicodedata

from plugins.errors import InputError, UserError
from plugins.text import one_line, printable, some

OBEYED = "\x1b]0;title\x07\r\x9b31m\u202e\u2066\u2028\x85\x7f"


def test_every_control_character_is_escaped_and_letters_stay() -> None:
    assert printable(OBEYED) == ("\\x1b]0;title\\x07\\r\\x9b31m\\u202e\\u2066\\u2028\\x85\\x7f")
    for text in ("naïve – 模型 🙂👩‍👧", "C:\\new", "a[/]b"):
        assert printable(text) == text
    left = {
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF")
        or unicodedata.bidirectional(character) in ("LRI", "RLI", "FSI", "PDI")
        if printable(character) == character
    }
    assert left == set()


def test_once_is_as_good_as_twice() -> None:
    assert printable(printable(OBEYED)) == printable(OBEYED)
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_an_error_shows_names_in_one_line_and_a_programs_output_in_its_own() -> None:
    error = InputError(
        "ten\x1b[2Jsor\n", "got \u202ename, expected b", "Do \x9bc", "one\ntwo\x1b\n"
    )
    assert str(error) == (
        "ten\\x1b[2Jsor\\n: got \\u202ename, expected b. Do \\x9bc.\none\ntwo\\x1b\n"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_very_long_part_of_an_error_loses_its_middle() -> None:
    error = UserError("a" * 5000, "got b", "Do c", output="d" * 5000)
    assert str(error) == f"{'a' * 750} ... {'a' * 750}: got b. Do c.\n{'d' * 5000}"


def test_many_names_and_long_reasons_are_cut() -> None:
    assert some(["a"]) == "a" and some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert one_line(ValueError("no\n  such\tthing")) == "no such thing"
    assert one_line("x" * 300) == f"{'x' * 200} ..." and one_line("xyz", 2) == "xy ..."
