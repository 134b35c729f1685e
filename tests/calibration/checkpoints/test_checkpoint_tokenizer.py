"""Tokenizers of Hugging Face folders that cannot be read, and what is said about them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from plugins.errors import InputError


@pytest.fixture
def with_tokenizer_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with a damaged tokenizer.model and no tokenizer.json."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


def _without_sentencepiece(find: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, *more: None if name == "sentencepiece" else find(name, *more)


def test_tokenizer_model_without_sentencepiece(
    with_tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(with_tokenizer_model), True)
    monkeypatch.setattr(
        importlib.util, "find_spec", _without_sentencepiece(importlib.util.find_spec)
    )
    with pytest.raises(InputError) as caught:
        checkpoint.tokenizer()
    assert str(caught.value) == (
        f"{with_tokenizer_model / 'tokenizer.model'}: got a sentencepiece tokenizer and no "
        "tokenizer.json, expected the package sentencepiece to read it. "
        "Run `pip install sentencepiece`, or put the model's tokenizer.json beside it."
    )
