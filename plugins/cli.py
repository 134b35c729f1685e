"""What every command line does around its work: standard streams that can be written to, exit codes,
one message without a traceback, checked arguments.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from plugins.errors import EXIT_INTERRUPT, EXIT_OTHER, UserError
from plugins.text import printable

__all__ = [
    "Parser",
    "add_version",
    "number",
    "offline",
    "program",
    "run_cli",
    "streams",
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
            text = _of_the_system(error)
            if text is None and not failed():
                raise
            code = EXIT_OTHER if failed() else _say(text or "", EXIT_OTHER)
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


# ---------------------------------------------------------------- standard streams


class _Output:
    """A standard stream that is the null device from its first error on, so that Python's own flush
    at the end has nothing to say.

    Args:
        stream: the stream.
        raises: the error is raised too; else nobody notices but who asks for `lost`.
    """

    def __init__(self, stream: TextIO, raises: bool) -> None:
        self._stream, self._raises = stream, raises
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError as error:
            self.lost = error
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._raises:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def streams(stdout_is_result: bool) -> Iterator[Callable[[], bool]]:
    """Make stdout and stderr ones that any text can be written to, whatever was given for them:
    nothing, a full disk, a pipe that nobody reads any more, an encoding that lacks a character
    (which is then escaped).

    stderr is for those who want to know: what cannot be written there is lost and nothing else.

    Args:
        stdout_is_result: text that cannot be written to stdout is an error, raised where it is
            written. Else results are elsewhere, such as in a folder, and work goes on; what was
            lost is told at the end.

    Yields:
        A function that flushes stdout and tells whether a result was lost.
    """
    _open_missing()
    output = _Output(sys.stdout, raises=stdout_is_result)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    told: list[OSError] = []

    def failed() -> bool:
        with suppress(OSError):
            output.flush()
        if output.lost is not None and not told:
            told.append(output.lost)
            if not isinstance(output.lost, BrokenPipeError):  # who leaves does not want to hear it
                print(
                    UserError(
                        "stdout",
                        f"got {output.lost.strerror} while writing, expected room for all of it",
                        "Send it elsewhere" if stdout_is_result else "Files are not concerned",
                    ),
                    file=sys.stderr,
                )
        return bool(told) and stdout_is_result

    with (
        redirect_stdout(cast(TextIO, output)),
        redirect_stderr(cast(TextIO, _Output(sys.stderr, raises=False))),
    ):
        try:
            yield failed
        except SystemExit as stop:  # of argparse, after --help
            if failed() and not stop.code:
                raise SystemExit(EXIT_OTHER) from None
            raise
        finally:
            failed()
            sys.stderr.flush()


def _open_missing() -> None:
    """Open the standard streams that were closed, or the next files would get their numbers, and
    what libraries print would go into these.
    """
    # Writing to a closed stdout is an error, as it is in other programs.
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # gets the lowest free number
    for name, stream in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            way = "w" if stream else "r"
            setattr(sys, name, open(stream, way, encoding="utf-8", closefd=False))  # noqa: SIM115


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
                self.error(
                    f"got {word}, bytes that are not {sys.getfilesystemencoding().upper()}, "
                    "expected text: rename the file, or choose a UTF-8 locale (LC_ALL, PYTHONUTF8)"
                )
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
