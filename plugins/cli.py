"""What every command line does around its work: exit codes, one message without a traceback,
checked arguments.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from plugins.errors import EXIT_INTERRUPT, EXIT_OTHER, InputError, UserError
from plugins.streams import streams
from plugins.text import printable

__all__ = [
    "Parser",
    "add_version",
    "number",
    "offline",
    "program",
    "run_cli",
    "whole_number",
]

# Set unless the user has set them; libraries read them when they are imported.
_ENVIRONMENT = {
    # torch's OpenMP threads spin while they wait; on a machine that does anything else that makes
    # them up to ten times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # ONNX Runtime (named in its library, 1.31), huggingface_hub and others that ask.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def run_cli(
    main: Callable[[], int], interrupted: str = "Interrupted.", stdout_is_result: bool = True
) -> int:
    """Run `main` and turn what it raises into an exit code: 2 bad input, 3 a failed check, 130
    Ctrl-C, 1 anything else.

    An error that is neither a UserError nor the system's is a bug and passes through with its
    traceback (Python then exits with 1).

    Args:
        main: the command; returns its exit code.
        interrupted: what to say after Ctrl-C.
        stdout_is_result: as of `streams`.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    with streams(stdout_is_result) as failed:
        try:
            code = main()
        except UserError as error:
            code = _say(str(error), error.exit_code)
        except KeyboardInterrupt:
            code = _say(interrupted, EXIT_INTERRUPT)
        except MemoryError:
            code = _say(
                "Memory: got less than this step needs. Close other programs, or use a smaller "
                "model.",
                EXIT_OTHER,
            )
        except Exception as error:
            lost = isinstance(error, OSError) and failed()
            text = "" if lost else _of_the_system(error)
            if text is None:
                raise
            code = EXIT_OTHER if lost else _say(text, EXIT_OTHER)
        return code or (EXIT_OTHER if failed() else 0)


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code


def _of_the_system(error: Exception) -> str | None:
    """What to say of an error that the operating system gave; None of any other."""
    if os.strerror(errno.EMFILE) in str(error):  # libraries raise kinds of their own
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return str(
            UserError(
                "open files",
                f"got a limit of {limit} at a time, expected more",
                "Raise it in this shell, such as: ulimit -n 1024",
            )
        )
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    where = error.filename if error.filename is not None else "the system"
    return str(
        UserError(
            os.fsdecode(where) if isinstance(where, str | bytes) else str(where),
            f"got {error.strerror}, expected a file that can be used",
            "Check the path, the permissions and the disk",
        )
    )


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Tell the libraries that are imported in a with block to stay off the network, where that is
    wanted.
    """
    variable = "HF_HUB_OFFLINE"  # datasets follows it too
    before = os.environ.get(variable)
    if wanted:
        os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before
        elif wanted:
            del os.environ[variable]


# ---------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """An argument parser that takes text only, and whose messages show any of it."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, after a look at the words; of bytes that are no text, files of ours could not
        tell.
        """
        args = sys.argv[1:] if args is None else args
        for word in args:
            try:
                word.encode("utf-8")
            except UnicodeEncodeError:
                readable = os.fsencode(word).decode("utf-8", "backslashreplace")
                encoding = sys.getfilesystemencoding().upper()
                error = InputError(
                    "arguments",
                    f"got {readable}, bytes that are not {encoding}, expected text",
                    "Rename the file, or choose a UTF-8 locale (LC_ALL, PYTHONUTF8)",
                )
                self.exit(error.exit_code, f"{error}\n")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        super().error(printable(message))


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
