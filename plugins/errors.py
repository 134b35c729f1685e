"""The one error users see: where it happened, what was got against what was expected, and what to
do.
"""

from __future__ import annotations

from plugins.text import printable, shown

__all__ = [
    "CheckError",
    "EXIT_CHECK",
    "EXIT_INPUT",
    "EXIT_INTERRUPT",
    "EXIT_OTHER",
    "InputError",
    "UserError",
]

EXIT_OTHER = 1
EXIT_INPUT = 2
EXIT_CHECK = 3
EXIT_INTERRUPT = 130

_LONGEST = 1500  # characters of a part


class UserError(Exception):
    """An error with three parts; printed without a traceback by every command line.

    Args:
        where: the op, layer, tensor, file or option concerned.
        problem: what was got against what was expected, with values.
        fix: what the user can do about it.
        output: what another program said, shown below in its own lines.

    Names in all of them may come from anywhere: control characters are escaped, and the middle of
    a very long part is left out.
    """

    exit_code = EXIT_OTHER

    def __init__(self, where: str, problem: str, fix: str, output: str = "") -> None:
        self.where, self.problem, self.fix = (
            shown(printable(part), _LONGEST) for part in (where, problem, fix)
        )
        self.output = printable(output, keep="\n\t")
        below = f"\n{self.output}" if output else ""
        super().__init__(f"{self.where}: {self.problem}. {self.fix}.{below}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.problem, self.fix, self.output)


class InputError(UserError):
    """The input or the usage is wrong (exit code 2)."""

    exit_code = EXIT_INPUT


class CheckError(UserError):
    """A check of ours failed: validation, perplexity, plugin count (exit code 3)."""

    exit_code = EXIT_CHECK
