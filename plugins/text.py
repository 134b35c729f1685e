"""Text that somebody else chose (names in files, paths, options), made fit to be shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["one_line", "printable", "shown", "some"]

# What a terminal obeys or what disarranges a line: C0 and C1 controls with DEL, marks and overrides
# of the writing direction, line and paragraph separators, and halves of surrogate pairs, which stand
# for bytes that are not UTF-8 and which no file takes.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, keep: str = "") -> str:
    """Escape every control character as Python's source does; letters of every script stay.

    Args:
        text: what to show; doing this twice changes nothing more.
        keep: control characters that may stay, such as a newline in a compiler's output.
    """
    return _CONTROL.sub(
        lambda found: (
            found[0] if found[0] in keep else found[0].encode("unicode_escape").decode("ascii")
        ),
        text,
    )


def shown(name: object, longest: int = 120) -> str:
    """A name, or another value, as a message shows it: the middle of a very long one is left out."""
    text, half = str(name), longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def one_line(text: object, longest: int = 200) -> str:
    """What a library says, without its line ends and cut where it is very long."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[:longest]} ..."


def some(names: Sequence[object], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
