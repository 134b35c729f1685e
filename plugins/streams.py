"""Standard streams that any text can be written to, whatever a shell gave for them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from plugins.errors import EXIT_OTHER, UserError

__all__ = ["streams"]


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
            with suppress(OSError), open(os.devnull, "wb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), self._stream.fileno())
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
