"""Commands that take long can be stopped: exit code 130, one line, and earlier results whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.out.files import file_records
from calibration.out.json_file import read_json
from calibration.progress import NullProgress
from deploy.__main__ import main
from exporter.run.sessions import DecoderSession
from tests.conftest import REPOSITORY

TEXT = str(REPOSITORY / "calibration" / "default_text.txt")
SHORT = ("--first", "2", "--seqlen", "16")


class Impatient(NullProgress):
    """Ctrl-C at the first step of a stage."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--text", TEXT, *SHORT),
        ("compare", *SHORT),
        ("attribute", *SHORT),
        ("prove",),
        ("diff", "{}/out"),
        ("triton", "--to", "{}/models"),
        ("pack", "-o", "{}/model.anybit"),
        ("polygraphy", "--to", "{}/checks"),
    ],
    ids=lambda words: str(words[0]),
)
def test_ctrl_c(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr("calibration.progress.make_progress", lambda kind: Impatient())
    before = file_records(copy)
    command, *options = (word.format(tmp_path) for word in words)
    assert main([command, str(copy), *options]) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "Interrupted." and not captured.out
    assert file_records(copy, only="[!.]*") == {
        name: record for name, record in before.items() if not name.startswith(".")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "words", [("generate", "--prompt", "a"), ("bench",)], ids=lambda words: words[0]
)
def test_ctrl_c_in_a_call(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    """Of the commands without a bar."""

    def stopped(self: DecoderSession, *arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DecoderSession, "run", stopped)
    assert main([words[0], str(artifact), *words[1:], "--runner", "onnxruntime"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted."


def test_a_stopped_unpack_leaves_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, to = tmp_path / "model.anybit", tmp_path / "back"
    assert main(["pack", str(copy), "-o", str(pack), "--progress", "none"]) == 0
    before = pack.read_bytes()
    monkeypatch.setattr("calibration.progress.make_progress", lambda kind: Impatient())
    assert main(["unpack", str(pack), "--to", str(to)]) == 130
    assert not to.exists() and {path.name for path in tmp_path.iterdir()} == {
        "model.anybit",
        "out",
    }
    assert pack.read_bytes() == before


@pytest.mark.slow
def test_a_signal_in_the_midst_of_it(copy: Path) -> None:
    words = ("--first", "600", "--seqlen", "20", "--progress", "json")
    running = subprocess.Popen(
        [sys.executable, "-m", "deploy", "attribute", str(copy), *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if '"finish"' in line:  # the first walk is over
            break
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "Interrupted." and "Traceback" not in said
    measured = read_json(copy / "attribution.json")["measured"]
    assert {"as it is", "everything", "layer 0", "layer 1"} <= measured.keys()
