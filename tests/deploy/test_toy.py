"""A runner or a command is one file: put into the package, it is found, offered and run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import deploy
import exporter.run
from deploy.__main__ import build_parser, main

RUNNER = '''
"""Says the next number."""

import numpy as np

from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession


class CountingSession(DecoderSession):
    def _forward(self, input_ids, attention_mask, positions, wanted):
        tokens = np.take_along_axis(input_ids, wanted, 1)
        logits = np.zeros((*tokens.shape, 512), np.float32)
        np.put_along_axis(logits, (tokens[..., None] + 1) % 512, 1, -1)
        return {"logits": logits}

    def _clear(self):
        pass

    def close(self):
        pass


class CountingRunner(Runner):
    name = "counting"
    stage = "onnx"
    help = "counts"

    def open(self, folder, description):
        assert folder.file("model.onnx").is_file()
        return CountingSession(description.max_context)


RUNNER = CountingRunner()
'''
COMMAND = '''
"""Says what is there."""

from deploy.command import Command


class List(Command):
    name = "list"
    help = "list the folder"
    description = "Prints names."

    def add_arguments(self, parser):
        parser.add_argument("--only", default="")

    def run(self, out, args):
        print([path.name for path in sorted(out.iterdir()) if args.only in path.name])


COMMAND = List()
'''


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both files, as if they lay in exporter/run and in deploy."""
    import sys

    for package, name, source in ((exporter.run, "counting", RUNNER), (deploy, "toy", COMMAND)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield
    for module in ("exporter.run.counting", "deploy.toy"):
        sys.modules.pop(module, None)


def test_a_toy_runner_generates(
    artifact: Path, toys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--prompt", "a", "--max-new-tokens", "3"]
    assert main(["generate", str(artifact), *command, "--runner", "counting"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("abcd") and captured.err.startswith("3 tokens in ")
    assert captured.err.endswith(" s, counting\n")
    assert main(["generate", str(artifact), *command]) == 0  # auto does not take it unasked
    assert capsys.readouterr().err.endswith(" s, native\n")
    text = Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt"
    score = ["--text", str(text), "--first", "1", "--seqlen", "16", "--progress", "none"]
    assert main(["eval", str(artifact), *score, "--runner", "counting"]) == 0
    assert '"runner": "counting"' in capsys.readouterr().out


def test_a_toy_command_runs(artifact: Path, toys: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(artifact), "--only", "manifest"]) == 0
    assert capsys.readouterr().out == "['manifest.json']\n"


def test_an_unknown_runner_lists_what_there_is(
    artifact: Path, toys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(
            ["generate", str(artifact), "--prompt", "x", "--runner", "abacus"]
        )
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m deploy generate: error: argument --runner: invalid choice:")
    for name in ("auto", "torch", "counting", "onnxruntime", "tensorrt"):
        assert name in line
