"""run_cli: what a command raises becomes an exit code and one message."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins.cli import number, offline, run_cli, whole_number
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


def test_a_bug_keeps_its_traceback_where_stdout_is_lost() -> None:
    script = "from plugins.cli import run_cli\nrun_cli(lambda: [print('x', end=''), 1 // 0] and 0)"
    code, _, err = shell(script, ">/dev/full")
    assert code == 1 and "ZeroDivisionError" in err and "stdout: got No space left" in err


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


def shell(script: str, redirections: str, **environment: str) -> tuple[int, str, str]:
    """Exit code and what still arrived of stdout and stderr of a Python script in a shell."""
    done = subprocess.run(
        ["bash", "-c", f"exec {shlex.join([sys.executable, '-c', script])} {redirections}"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


PRINTS = """
import sys
from plugins.cli import run_cli

def main():
    print("on stderr", file=sys.stderr, flush=True)
    for _ in range({times}):
        print("a r\\u00e9sum\\u00e9")
    return 0

sys.exit(run_cli(main, stdout_is_result={result}))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("times", [1, 9999])
@pytest.mark.parametrize(
    ("redirections", "problem"),
    [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")],
)
def test_a_result_that_cannot_be_written_is_an_error_and_a_table_is_not(
    redirections: str, problem: str, times: int, unbuffered: str
) -> None:
    text = f"stdout: got {problem} while writing, expected room for all of it."
    script = PRINTS.format(times=times, result=True)
    assert shell(script, redirections, PYTHONUNBUFFERED=unbuffered) == (
        1,
        "",
        f"on stderr\n{text} Send it elsewhere.\n",
    )
    script = PRINTS.format(times=times, result=False)
    assert shell(script, redirections, PYTHONUNBUFFERED=unbuffered) == (
        0,
        "",
        f"on stderr\n{text} Files are not concerned.\n",
    )


@pytest.mark.parametrize("result", [True, False])
@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- 2>&-", "<&-"])
def test_without_stderr_work_goes_on(redirections: str, result: bool) -> None:
    script = PRINTS.format(times=1, result=result)
    err = "" if "2>" in redirections else "on stderr\n"
    assert shell(script, redirections) == (0, "a résumé\n", err)


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints to file 2 would go into the user's file."""
    script = f"""
import os, sys
from plugins.cli import run_cli

def main():
    with open({str(tmp_path / "mine")!r}, "w") as file:
        os.write(2, b"a library's log")
        file.write(str(file.fileno() > 2))
    return 0

sys.exit(run_cli(main, stdout_is_result=False))
"""
    assert shell(script, "<&- >&- 2>&-")[0] == 0
    assert (tmp_path / "mine").read_text() == "True"


def test_a_reader_that_leaves_stops_no_work_whose_results_are_files() -> None:
    script = PRINTS.format(times=99999, result=False)
    assert shell(f"{script}", "| head -1; exit ${PIPESTATUS[0]}")[:2] == (0, "a résumé\n")


def test_an_encoding_without_the_character_escapes_it() -> None:
    script = PRINTS.format(times=1, result=True)
    assert shell(script, "", PYTHONIOENCODING="ascii") == (0, "a r\\xe9sum\\xe9\n", "on stderr\n")
    names = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    assert shell(script, "", **names) == (0, "a r\\xe9sum\\xe9\n", "on stderr\n")


RAISES = (
    "import os, sys; from plugins.cli import run_cli\ndef main():\n    {}\nsys.exit(run_cli(main))"
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "open('/dev/null/\\x1b[2J')",
            "/dev/null/\\x1b[2J: got Not a directory, expected a file that can be used. Check the "
            "path, the permissions and the disk.\n",
        ),
        (
            "raise OSError(5, 'Input/output error')",
            "the system: got Input/output error, expected a file that can be used. Check the path, "
            "the permissions and the disk.\n",
        ),
        (
            "files = [open(os.devnull) for _ in range(99)]",
            "open files: got a limit of 16 at a time, expected more. Raise it in this shell, such "
            "as: ulimit -n 1024.\n",
        ),
        (
            "raise ImportError('libtorch.so: cannot open: Too many open files')",
            "open files: got a limit of 16 at a time, expected more. Raise it in this shell, such "
            "as: ulimit -n 1024.\n",
        ),
    ],
)
def test_what_the_system_refuses_is_a_message(line: str, message: str) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"ulimit -n 16; exec {shlex.join([sys.executable, '-c', RAISES.format(line)])}",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_help_that_cannot_be_written_is_an_error() -> None:
    for module, code in (("deploy", 1), ("deploy.anybit", 1), ("plugins", 1), ("exporter", 0)):
        script = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        assert shell(script, ">/dev/full")[0] == code, module
        assert shell(script, "| head -1 > /dev/null")[2] == "", module


def test_arguments_are_text_and_shown_as_such(
    run_module: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_module("deploy", "generate", "x", "--prompt", "y", "--\x1b[31m")
    assert done.returncode == 2 and done.stderr.endswith("arguments: --\\x1b[31m\n")
    words = ("generate", os.fsdecode(b"caf\xe9"), "--prompt", "y")
    for module, arguments in (("deploy", words), ("deploy.anybit", words[1:]), ("exporter", words)):
        done = run_module(module, *arguments)
        assert (done.returncode, done.stderr) == (
            2,
            "arguments: got caf\\xe9, bytes that are not UTF-8, expected text. Rename the file, or "
            "choose a UTF-8 locale (LC_ALL, PYTHONUTF8).\n",
        )
    done = run_module(
        "deploy", "generate", "café", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert (
        done.returncode == 2 and "arguments: got caf\\xe9, bytes that are not ASCII" in done.stderr
    )


def test_nobody_is_told_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    assert run_cli(lambda: int([os.environ[name] for name in variables] != ["1"] * 3)) == 0


def test_offline_lasts_as_long_as_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        else:
            monkeypatch.setenv("HF_HUB_OFFLINE", before)
        for wanted in (True, False):
            with offline(wanted):
                assert os.environ.get("HF_HUB_OFFLINE") == ("1" if wanted else before)
            assert os.environ.get("HF_HUB_OFFLINE") == before


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
