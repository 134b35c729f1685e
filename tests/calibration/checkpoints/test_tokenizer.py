"""Tokenizers of artifact folders: nothing is read, or run, that their lists do not name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.checkpoints.tokenizer import load_tokenizer
from calibration.out.folder import open_stage
from calibration.out.layout import QUANT
from calibration.quant.folder import read_quant
from plugins.errors import InputError


@pytest.fixture
def quant(tiny_quant: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a quant folder that the test may add to."""
    return shutil.copytree(tiny_quant() / QUANT, tmp_path / "quant")


@pytest.mark.parametrize("name", ["config.json", "own.py", "sub/own.py", "vocab.txt", "token"])
def test_a_file_that_nobody_named_is_refused(quant: Path, name: str) -> None:
    path = quant / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    problem = f"{path}: got a file without a record, expected one of this stage's. "
    with pytest.raises(InputError) as caught:
        read_quant(quant).tokenizer()
    assert str(caught.value) == f"{problem}The folder is damaged: quantise the model again."
    with pytest.raises(InputError) as caught:
        open_stage(quant, QUANT, "a test").tokenizer(())
    assert str(caught.value) == (
        f"{problem}Renew it with: python -m exporter MODEL --wbits W --abits A --until quant --out "
        "OUT --resume."
    )


def test_files_that_nobody_reads_may_lie_there(quant: Path) -> None:
    for name in (".DS_Store", "README.md"):
        (quant / name).write_text("x")
    assert read_quant(quant).tokenizer()("a")["input_ids"]
    assert open_stage(quant, QUANT, "a test").tokenizer(())("a")["input_ids"]


def test_code_is_refused_wherever_it_is_named(tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    assert load_tokenizer(folder, "")("a")["input_ids"]
    path = folder / "config.json"
    path.write_text(json.dumps({"auto_map": {"AutoConfig": "own.Own"}}))
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder, "")
    assert caught.value.where == f"{path}, auto_map"
