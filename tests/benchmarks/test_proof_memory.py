"""The benchmark of a proof's memory: it watches a real proof, keeps what is finished where it is stopped, and
takes away what it made.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.__main__ import main as export
from tests.conftest import REPOSITORY, W4A8


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("proof_memory")


@pytest.mark.slow
def test_a_proof_is_watched(
    script: Any, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(tiny_model_dir), *W4A8, "--method", "rtn", "--head-bits", "16", "--out", str(out)]
    assert export([*words, "--until", "onnx", "--offline", "--progress", "none"]) == 0
    capfd.readouterr()
    found = script.measure(out, 8, 4 * 10**9)
    estimate = found["estimate_bytes"]
    said = capfd.readouterr().out
    assert said.startswith(f"estimate: {estimate / 1e9:.2f} GB, function bodies whole, with the")
    assert "Proven: " in said and " GB  report onnxruntime, prefill\n" in said
    assert found["weights"] == 2 * 36864 and not found["bodies_folded"]
    assert found["peak_bytes"] == max(found["parts"].values()) > 100 * 10**6
    assert found["ratio"] == round(found["peak_bytes"] / estimate, 3)
    with pytest.raises(SystemExit) as ended:
        script.prove(out / "none", 8, 0)
    assert str(ended.value) == "the proof ended with 2: nothing was measured"


def test_what_is_finished_is_kept_and_goes_in_the_end(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, commands, made, written = tmp_path / "work", [], [], {}
    own = work / "tiny-1-layers"
    somebodys = work / "out" / "llama-7b"  # WORK may have anything else in it
    somebodys.mkdir(parents=True)
    write_model = script.write_model
    answers: list[Any] = [KeyboardInterrupt, {"peak_bytes": 9, "estimate_bytes": 10, "ratio": 0.9}]

    def model(folder: Path, *arguments: Any) -> None:
        made.append(folder)
        write_model(folder, *arguments)

    def exporter(command: list[str], **_: Any) -> None:
        commands.append(command[3:])
        (own / "out").mkdir(exist_ok=True)

    def measure(*_: Any) -> Any:
        if (answer := answers.pop(0)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(script, "write_model", model)
    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "write_result", written.__setitem__)
    monkeypatch.setattr(script.subprocess, "run", exporter)
    words = ["proof_memory.py", str(work), "--like", "tiny", "--layers", "1", "--memory", "4"]
    monkeypatch.setattr(sys, "argv", [*words, "--", "--wbits", "8"])
    assert script.main() == 130
    assert capsys.readouterr().err == (
        "Interrupted; the same command goes on with what is finished.\n"
    )
    assert sorted(path.name for path in own.iterdir()) == ["model", "out"]
    assert script.main() == 0
    assert made == [own / "model.part"] and commands[0] == commands[1]
    assert commands[0][-3:] == ["--resume", "--wbits", "8"]
    assert list(work.iterdir()) == [work / "out"] and somebodys.is_dir()
    assert list(written) == ["proof-memory-tiny-1-layers"]
    assert capsys.readouterr().out.endswith("within 20 %\nfits into 4 GB\n")
