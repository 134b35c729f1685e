"""run_cli: what a command raises becomes an exit code and one message."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins.cli import number, run_cli, whole_number
from plugins.errors import CheckError, InputError, UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("a", "got b", "Do c"), 2, "a: got b. Do c.\n"),
        (CheckError("a", "got b", "Do c"), 3, "a: got b. Do c.\n"),
        (UserError("a", "got b", "Do c"), 1, "a: got b. Do c.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (
            MemoryError(),
            1,
            "Memory: got less than this step needs. Close other programs, or use a smaller model.\n",
        ),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert run_cli(main) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_the_commands_own_code_passes_through() -> None:
    assert run_cli(lambda: 0) == 0
    assert run_cli(lambda: 3) == 3


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)


def test_a_reader_that_leaves_is_no_traceback() -> None:
    code = (
        "import sys; from plugins.cli import run_cli\nsys.exit(run_cli(lambda: [print('x' * "
        "9999) for _ in range(99)] and 0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (whole_number(1), "7", 7),
        (whole_number(0), "0", 0),
        (number(0), "0.5", 0.5),
        (number(-1), "-1", -1.0),
    ],
)
def test_numbers(parse: Callable[[str], float], text: str, expected: float) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (whole_number(1), "0", "got 0, expected at least 1"),
        (whole_number(1), "1.5", "got '1.5', expected a whole number of at least 1"),
        (number(0), "-0.1", "got -0.1, expected a finite number of at least 0"),
        (number(0), "inf", "got inf, expected a finite number of at least 0"),
        (number(0), "warm", "got 'warm', expected a number of at least 0"),
    ],
)
def test_bad_numbers(parse: Callable[[str], float], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value) == message
