"""The proof goes beyond an attention window, or says that it did not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.__main__ import main as export
from exporter.graph import decoder
from exporter.proof.options import ValidateOptions
from exporter.proof.validate import validate
from tests.conftest import W4A8

EXPORT = ("onnxruntime", "torch")


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    """Its attention sees 70 tokens."""
    return tiny_llama(architecture="Mistral", sliding_window=70, num_hidden_layers=1)


def exported(model: Path, out: Path) -> Path:
    words = [str(model), *W4A8, "--method", "rtn", "--head-bits", "16", "--out", str(out)]
    assert export([*words, "--until", "onnx", "--offline", "--progress", "none"]) == 0
    return out


def test_by_default_it_is_crossed(model: Path, tmp_path: Path) -> None:
    out = exported(model, tmp_path / "out")
    result = validate(out, ValidateOptions(steps=0, runners=EXPORT))
    assert result.ok, result.first_failure
    assert result.facts["tokens"] == 78 and "window" not in " ".join(result.notes)
    result = validate(out, ValidateOptions(tokens=68, steps=2, runners=EXPORT))
    assert result.notes[0] == (
        "The attention window of 70 tokens was not reached by the 70 that were run, so nothing "
        "beyond it was proven; --tokens 78 reaches it."
    )


def test_a_graph_without_the_window_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = decoder._near
    monkeypatch.setattr(decoder, "_near", lambda *rest: near(*rest[:-1], 10_000))
    out = exported(model, tmp_path / "out")
    result = validate(out, ValidateOptions(steps=0, runners=EXPORT))
    assert " at model.layers.0.self_attn.context given its inputs " in result.first_failure
