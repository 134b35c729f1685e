"""The command line of deploy: results on stdout, one message on stderr, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from deploy.__main__ import main
from plugins.errors import InputError
from tests.forks import run_command

TEXT = str(Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt")
Run = Callable[..., "CompletedProcess[str]"]


def test_eval_ends_with_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "eval",
                str(artifact),
                "--text",
                TEXT,
                "--first",
                "2",
                "--seqlen",
                "64",
                "--progress",
                "json",
            ]
        )
        == 0
    )
    *events, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [event["event"] for event in events] == ["start", "progress", "progress", "finish"]
    assert last.keys() == {"ppl", "windows", "runner", "seqlen", "tokens", "seconds"}
    assert (last["windows"], last["runner"], last["tokens"]) == (2, "native", 126)
    assert 1 < last["ppl"] < 1e4


def test_progress_goes_to_stderr(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "eval",
                str(artifact),
                "--text",
                TEXT,
                "--windows",
                "2",
                "--seqlen",
                "64",
                "--progress",
                "plain",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 and captured.err.startswith("eval: ")


def test_generate_in_a_process_of_its_own(artifact: Path, tmp_path: Path, run_module: Run) -> None:
    arguments = (
        "deploy",
        "generate",
        str(artifact),
        "--prompt",
        "The river",
        "--max-new-tokens",
        "5",
        "--runner",
        "onnxruntime",
    )
    whole = run_module(*arguments)
    assert whole.returncode == 0, whole.stderr
    code, streamed, err = run_command(tmp_path, *arguments, "--stream")
    assert code == 0, err
    assert whole.stdout.startswith("The river") and whole.stdout == streamed
    assert whole.stderr.startswith("5 tokens in ") and whole.stderr.endswith(" s, onnxruntime\n")


def test_an_error_is_one_message_without_a_traceback(tmp_path: Path, run_module: Run) -> None:
    done = run_module("deploy", "generate", str(tmp_path / "none"), "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{tmp_path / 'none'}: got no such folder, expected an artifact folder. "
        "Make one with: python -m exporter MODEL --wbits W --abits A --out DIR.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "out", "--prompt", "x", "--max-new-tokens", "0"],
            "argument --max-new-tokens: got 0, expected at least 1",
        ),
        (
            ["generate", "out", "--prompt", "x", "--max-new-tokens", "many"],
            "argument --max-new-tokens: got 'many', expected a whole number of at least 1",
        ),
        (
            ["generate", "out", "--prompt", "x", "--temperature", "-1"],
            "argument --temperature: got -1, expected a finite number of at least 0",
        ),
        (
            ["generate", "out", "--prompt", "x", "--temperature", "nan"],
            "argument --temperature: got nan, expected a finite number of at least 0",
        ),
        (
            ["generate", "out", "--prompt", "x", "--top-k", "-3"],
            "argument --top-k: got -3, expected at least 0",
        ),
        (
            ["eval", "out", "--text", "t", "--seqlen", "1"],
            "argument --seqlen: got 1, expected at least 2",
        ),
        (
            ["eval", "out", "--text", "t", "--windows", "-2"],
            "argument --windows: got -2, expected at least 1",
        ),
        (["eval", "out"], "the following arguments are required: --text"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"python -m deploy {arguments[0]}: error: {message}"
    )


def test_a_failed_check_is_exit_code_3(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "exporter.proof.perplexity.window_nll", lambda session, window: float("nan")
    )
    assert main(["eval", str(artifact), "--text", TEXT, "--first", "1", "--progress", "none"]) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (InputError("a", "b", "c"), 2)]
)
def test_the_terminal_is_given_back(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
) -> None:
    from rich.live import Live

    lives: list[Live] = []
    start = Live.start
    monkeypatch.setattr(
        Live, "start", lambda self, refresh=False: (lives.append(self), start(self, refresh))[-1]
    )

    def fail(*arguments: Any) -> float:
        raise failure

    monkeypatch.setattr("exporter.proof.perplexity.window_nll", fail)
    assert (
        main(["eval", str(artifact), "--text", TEXT, "--first", "1", "--progress", "rich"]) == code
    )
    assert [live.is_started for live in lives] == [False]
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Interrupted." if code == 130 else "a: b. c."
    )


def test_ctrl_c_is_exit_code_130(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.proof.perplexity.window_nll", interrupt)
    assert (
        main(["eval", str(artifact), "--text", TEXT, "--first", "1", "--progress", "none"]) == 130
    )
    assert capsys.readouterr().err == "Interrupted.\n"
