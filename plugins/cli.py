"""What every command line does around its work: exit codes, one message without a traceback,
checked numbers.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from plugins.errors import EXIT_INTERRUPT, EXIT_OTHER, UserError

__all__ = ["add_version", "number", "program", "run_cli", "whole_number"]


def run_cli(main: Callable[[], int], interrupted: str = "Interrupted.") -> int:
    """Run `main` and turn what it raises into an exit code: 2 bad input, 3 a failed check, 130
    Ctrl-C, 1 anything else.

    An error that is not a UserError is a bug and passes through with its traceback (Python then
    exits with 1).
    """
    # torch's OpenMP threads spin while they wait; on a machine that does anything else that makes
    # them up to ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = main()
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say(interrupted)
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader (head, less) left; nothing more can be said on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OTHER
    except MemoryError:
        _say("Memory: got less than this step needs. Close other programs, or use a smaller model.")
        return EXIT_OTHER


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def program(package: str, command: str) -> str:
    """How the running command line was called, for its usage: python -m PACKAGE, or anybit
    COMMAND.
    """
    own = Path(sys.argv[0]).name == "anybit"
    return f"anybit {command}".rstrip() if own else f"python -m {package}"


class _Version(argparse.Action):
    """Prints the version of the installed distribution; looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("anybit-trt")
        except metadata.PackageNotFoundError:
            version = "of a folder that is not installed"
        print(f"anybit-trt {version}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """--version, of every command line."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number of at least {least}"
            ) from None
        if value < least:
            raise argparse.ArgumentTypeError(f"got {value}, expected at least {least}")
        return value

    return parse


def number(least: float) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a number of at least {least:g}"
            ) from None
        if not math.isfinite(value) or value < least:
            raise argparse.ArgumentTypeError(
                f"got {text}, expected a finite number of at least {least:g}"
            )
        return value

    return parse
