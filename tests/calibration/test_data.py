"""Calibration text: what a name stands for, the text that comes along, and what is too short."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration import text_file
from calibration.data import (
    calibration_windows,
    default_text,
    load_text,
    text_tokens,
    windows_from_tokens,
)
from calibration.settings import CalibrationSettings
from plugins.errors import InputError


class WordTokenizer:
    """One token per word."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [len(word) for word in text.split()]}


def _refusal(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_text(spec, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_default_text_is_long_enough_to_be_useful() -> None:
    assert load_text(None) == default_text()
    assert len(default_text().split()) > 1500 and len(set(default_text().lower().split())) > 600


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_empty_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    assert (
        _refusal(str(path))
        == f"--calib: got {path} with no text in it. Give a file with at least a few thousand words."
    )


@pytest.mark.parametrize(
    "name", ["none/of/this.txt", "none.json.gz", "~nobody-of-this-name/a.md", "x" * 300 + ".txt"]
)
def test_missing_file(name: str) -> None:
    assert _refusal(name, where="--text") == (
        f"--text: got no such file {name}, expected a .txt or .jsonl file or a dataset name. Check "
        "the path."
    )


def test_dataset_name_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _refusal("wikitext:wikitext-2-raw-v1:test") == (
        "--calib: got wikitext:wikitext-2-raw-v1:test, no such file, and dataset names need the "
        "package datasets. "
        "Give a .txt or .jsonl file, or pip install datasets."
    )


def test_dataset_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(dict[str, list[str]]):
        column_names = ("id", "text")

    class Library:
        @staticmethod
        def DownloadConfig(local_files_only: bool) -> bool:  # noqa: N802
            return local_files_only

        @staticmethod
        def load_dataset(name: str, config: str | None, split: str, download_config: bool) -> Rows:
            if name == "absent":
                raise FileNotFoundError("no such dataset\nlong trace")
            return Rows(text=["first", " ", f"{name} {config} {split} {download_config}"])

    monkeypatch.setitem(sys.modules, "datasets", Library)
    assert load_text("wiki:v1:test", offline=True) == "first\n\nwiki v1 test True"
    assert load_text("wiki") == "first\n\nwiki None train False"
    assert _refusal("absent") == (
        "--calib: got absent, neither a file nor a dataset that can be loaded (no such dataset). "
        "Check the name (NAME[:CONFIG[:SPLIT]]), or give a .txt or .jsonl file."
    )


def test_windows() -> None:
    assert windows_from_tokens(np.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_tokens_that_the_model_does_not_know(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """As a tokenizer that has grown beyond the embedding makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_tokenizer))
    vocab = len(tokenizer)
    tokenizer.add_tokens(["<|im_start|>"])
    assert text_tokens(tokenizer, "of bread", vocab, "--text").max() < vocab
    path = tmp_path / "a.txt"
    path.write_text("It begins with <|im_start|> here")
    with pytest.raises(InputError) as caught:
        calibration_windows(tokenizer, CalibrationSettings(calib=str(path)), 64, vocab)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"--calib: got the token '<|im_start|>' with id {vocab}, expected ids below the model's "
        f"vocab_size of {vocab}. Leave it out of the text, or give a model whose embedding has a "
        "row for it."
    )


# ---------------------------------------------------------------- calibration windows


def _windows(
    path: Path, text: str | bytes, longest: int = 2048, **settings: int
) -> tuple[np.ndarray, str]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return calibration_windows(
        WordTokenizer(), CalibrationSettings(calib=str(path), **settings), longest, 999
    )


def _numbers(count: int) -> str:
    """Words whose lengths, the tokens, are 1, 2, ... count."""
    return " ".join("x" * (index + 1) for index in range(count))


def test_calibration_windows_are_whole_and_drawn_from_all_of_the_text_by_the_seed(
    tmp_path: Path,
) -> None:
    """The loader of the evaluation cuts the same windows (no BOS, no overlap); calibration draws
    from its own text alone.
    """
    text, drawn = _numbers(400), []
    for seed in range(20):
        windows, note = _windows(tmp_path / "a.txt", text, nsamples=5, seqlen=8, seed=seed)
        assert windows.shape == (5, 8) and windows.dtype == np.int64 and note == ""
        starts = windows[:, 0] - 1
        assert (
            (windows == starts[:, None] + 1 + np.arange(8)).all()
            and (starts % 8 == 0).all()
            and len(set(starts)) == 5
        )
        drawn.append(tuple(starts))
    again, _ = _windows(tmp_path / "a.txt", text, nsamples=5, seqlen=8, seed=7)
    assert tuple(again[:, 0] - 1) == drawn[7]
    assert (
        len(set(drawn)) == 20 and max(max(starts) for starts in drawn) > 360
    )  # not the beginning alone


@pytest.mark.parametrize(
    ("words", "asked", "longest", "found"),
    [
        (64, (8, 8), 99, (8, 8)),
        (63, (8, 8), 99, (7, 8)),  # the end that fills no window is left out
        (12, (8, 8), 99, (1, 8)),
        (7, (8, 8), 99, (1, 7)),  # shorter than a window
        (2, (1, 2), 99, (1, 2)),
        (64, (4, 32), 16, (4, 16)),  # longer than the model takes
    ],
)
def test_a_short_text_gives_what_it_has(
    tmp_path: Path, words: int, asked: tuple[int, int], longest: int, found: tuple[int, int]
) -> None:
    windows, note = _windows(
        tmp_path / "a.txt", _numbers(words), longest, nsamples=asked[0], seqlen=asked[1]
    )
    assert windows.shape == found
    assert note == (
        ""
        if asked == found
        else f"Calibrating on {found[0]} windows of {found[1]} tokens; "
        f"{asked[0]} of {asked[1]} were asked for."
    )


def test_the_default_text_is_too_short_for_the_papers_and_says_so() -> None:
    settings = CalibrationSettings(nsamples=128, seqlen=2048)
    windows, note = calibration_windows(WordTokenizer(), settings, 4096, 999)
    assert windows.shape[1] == 2048 and 1 <= len(windows) < 128
    assert (
        note == f"Calibrating on {len(windows)} windows of 2048 tokens; 128 of 2048 were asked for."
    )


def test_packed_lines_of_json_are_calibrated_on_as_the_text_in_them(tmp_path: Path) -> None:
    texts = [_numbers(20), "one two", _numbers(30)]
    want, _ = _windows(tmp_path / "a.txt", "\n\n".join(texts), nsamples=4, seqlen=8)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name, content in (
        ("a.jsonl", lines.encode()),
        ("a.json", lines.encode()),
        ("a.txt", gzip.compress(lines.encode())),
        ("a.jsonl.gz", gzip.compress(lines.encode())),
        ("a.gz", gzip.compress("\n\n".join(texts).encode())),
    ):
        got, _ = _windows(tmp_path / name, content, nsamples=4, seqlen=8)
        np.testing.assert_array_equal(got, want)


def test_of_a_long_text_it_is_said_what_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "MOST_BYTES", 1 << 20)
    path = tmp_path / "a.txt"
    windows, note = _windows(path, "word " * 300_000, nsamples=1, seqlen=8)
    assert windows.shape == (1, 8) and note == f"{path} is long: its first 1 MB are used."


def test_calibration_takes_bytes_that_are_not_text(tmp_path: Path) -> None:
    text = b"one \xff\xfe three" + b" four" * 50
    windows, _ = _windows(tmp_path / "a.txt", text, nsamples=1, seqlen=52)
    assert windows[0, :3].tolist() == [3, 2, 5]  # a character that cannot be read counts as one
    with pytest.raises(InputError, match="got a file that is not UTF-8 text"):
        load_text(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("words", ["one", "one\n"])
def test_one_token_is_too_few(tmp_path: Path, words: str) -> None:
    with pytest.raises(InputError) as caught:
        _windows(tmp_path / "a.txt", words)
    assert (
        str(caught.value)
        == "--calib: got a text of 1 tokens, expected at least 2. Give a longer text."
    )
