"""Tokenizers of artifact folders: nothing is read, or run, that their lists do not name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.checkpoints.tokenizer import load_tokenizer
from calibration.out.files import sha256_file
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


def test_a_link_that_nobody_named_is_refused(quant: Path, tmp_path: Path) -> None:
    """To a folder, too: its files are no files of this folder, and transformers may read them."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tool.jinja").write_text("{{ x }}")
    link = quant / "additional_chat_templates"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        read_quant(quant).tokenizer()
    assert str(caught.value) == (
        f"{link}: got a symbolic link without a record, expected one of this stage's. The folder is "
        "damaged: quantise the model again."
    )
    link.unlink()
    whole = (quant / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (quant / "tokenizer.json").symlink_to(whole)  # it has a record, which says what is in it
    assert read_quant(quant).tokenizer()("a")["input_ids"]


def test_every_file_that_may_be_read_is_compared_with_its_record(
    quant: Path, tmp_path: Path
) -> None:
    extra = quant / "additional_chat_templates" / "tool.jinja"
    extra.parent.mkdir()
    extra.write_text("{{ x }}")
    meta = json.loads((quant / "quant.json").read_text())
    meta["files"]["additional_chat_templates/tool.jinja"] = sha256_file(extra)
    (quant / "quant.json").write_text(json.dumps(meta))
    assert open_stage(quant, QUANT, "a test").tokenizer(())("a")["input_ids"]
    extra.write_text("{{ y }}")
    with pytest.raises(InputError, match=r"tool\.jinja: got SHA-256 "):
        open_stage(quant, QUANT, "a test").tokenizer(())


def test_tokenizer_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "tokenizer.model"
    for data, message in (
        (
            b"\n\x0e\n\x05<unk>",
            "got a sentencepiece tokenizer and no tokenizer.json, expected the package sentencepiece "
            "to read it. Run `pip install sentencepiece`, or put the model's tokenizer.json beside "
            "it.",
        ),
        (
            b"IQ== 0\nIg== 1\n",
            "got a tokenizer of another kind than sentencepiece, expected a tokenizer.json. Convert "
            "it, or put the model's tokenizer.json beside it.",
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            load_tokenizer(tmp_path, "")
        assert str(caught.value) == f"{path}: {message}"


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
