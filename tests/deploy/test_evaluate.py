"""Perplexity: against transformers' own loss, between runners, and which windows are scored."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.quant.folder import read_quant
from deploy.__main__ import main
from deploy.evaluate import FloatModel, evaluate
from exporter.proof.perplexity import EvalRequest, select_windows, text_windows, window_nll
from plugins.errors import CheckError, InputError

TEXT = Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt"


class Bigram:
    """Logits that depend on the fed token alone; remembers what it was fed."""

    max_tokens = 5

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(11, 11)).astype(np.float32) * 30
        self.fed: list[int] = []

    def run(self, input_ids: np.ndarray, reset: bool = False) -> np.ndarray:
        self.fed = [*([] if reset else self.fed), *input_ids[0].tolist()]
        return self.table[input_ids]


@pytest.mark.parametrize("length", [2, 5, 6, 7, 23])
def test_window_nll_scores_every_token_but_the_first(length: int) -> None:
    session: Any = Bigram()
    window = np.arange(length) * 7 % 11
    for _ in range(2):  # the second window must not see the first
        got = window_nll(session, window)
    rows = session.table[window[:-1]].astype(np.float64)
    expected = -sum(
        row[target] - math.log(np.exp(row - row.max()).sum()) - row.max()
        for row, target in zip(rows, window[1:], strict=True)
    )
    assert got == pytest.approx(expected, rel=1e-6)
    assert session.fed == window[:-1].tolist()


def test_perplexity_is_that_of_whole_windows(artifact: Path) -> None:
    import torch

    from calibration.reference.model import quantised_model

    quant = read_quant(artifact / "quant")
    windows = text_windows(quant.tokenizer(), TEXT, 64, 512)[:3]
    model = quantised_model(quant)
    losses = []
    for window in windows:
        logits, targets = model(torch.tensor(window[None])).logits[0, :-1], torch.tensor(window[1:])
        losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
    expected = math.exp(sum(losses) / 3)
    result = {
        runner: evaluate(artifact, EvalRequest(TEXT, first=3, seqlen=64, runner=runner))
        for runner in ("torch", "onnxruntime")
    }
    assert result["torch"]["ppl"] == pytest.approx(expected, rel=1e-4)
    assert result["onnxruntime"]["ppl"] == pytest.approx(expected, rel=5e-3)
    assert {key: result["torch"][key] for key in ("windows", "runner", "seqlen", "tokens")} == {
        "windows": 3,
        "runner": "torch",
        "seqlen": 64,
        "tokens": 189,
    }


def test_the_float_model_beside_it(
    artifact: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    request = EvalRequest(TEXT, first=2, seqlen=48)
    found = evaluate(artifact, request, beside=FloatModel())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    windows = text_windows(read_quant(artifact / "quant").tokenizer(), TEXT, 48, 512)[:2]
    with torch.no_grad():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in torch.tensor(windows)]
    assert found["float_ppl"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert found["ppl"] == evaluate(artifact, request)["ppl"] != found["float_ppl"]
    # The onnx folder alone names no float model, but takes one.
    assert evaluate(artifact / "onnx", request, beside=FloatModel(str(tiny_model_dir)))[
        "float_ppl"
    ] == pytest.approx(found["float_ppl"], rel=1e-6)
    words = ["--text", str(TEXT), "--first", "2", "--seqlen", "48", "--progress", "none"]
    assert main(["eval", str(artifact), *words, "--float"]) == 0
    assert json.loads(capsys.readouterr().out)["float_ppl"] == found["float_ppl"]
    assert main(["eval", str(artifact / "onnx"), *words, "--float"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{artifact / 'onnx'}: got an artifact that names no float model, expected one. Give it with "
        "--model."
    )
    assert main(["eval", str(artifact), *words, "--model", "a"]) == 2
    assert capsys.readouterr().err == (
        "--model: got a without --float, expected both or neither. Add --float.\n"
    )


def test_another_float_model_is_refused(artifact: Path, tiny_llama: Callable[..., Path]) -> None:
    other = str(tiny_llama(rms_norm_eps=1e-6))
    with pytest.raises(InputError) as error:
        evaluate(artifact, EvalRequest(TEXT, first=1, seqlen=48), beside=FloatModel(other))
    assert str(error.value).startswith(
        f"{artifact}: got an artifact of another model (fingerprint "
    )


def test_windows_are_whole_and_have_no_special_token(artifact: Path) -> None:
    tokenizer = read_quant(artifact / "quant").tokenizer()
    windows = text_windows(tokenizer, TEXT, 100, 512)
    tokens = tokenizer(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    assert windows.shape == (len(tokens) // 100, 100)
    assert windows.reshape(-1).tolist() == tokens[: len(tokens) // 100 * 100]


@pytest.mark.parametrize(
    ("count", "windows", "first", "expected"),
    [
        (5, 0, 0, [0, 1, 2, 3, 4]),
        (5, 0, 2, [0, 1]),
        (5, 2, 0, [0, 2]),
        (10, 3, 0, [0, 3, 6]),
        (5, 5, 0, [0, 1, 2, 3, 4]),
        (9, 2, 4, [0, 2]),
        (9, 5, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_select_windows(count: int, windows: int, first: int, expected: list[int]) -> None:
    assert select_windows(count, windows, first) == expected


@pytest.mark.parametrize(
    ("windows", "first", "option", "limit", "which"),
    [
        (5, 0, "windows", 4, "the windows to choose from"),
        (3, 2, "windows", 2, "the windows to choose from"),
        (0, 5, "first", 4, "the whole windows of this text"),
    ],
)
def test_more_windows_than_the_text_has(
    windows: int, first: int, option: str, limit: int, which: str
) -> None:
    with pytest.raises(InputError) as error:
        select_windows(4, windows, first)
    assert str(error.value) == (
        f"--{option}: got {windows or first}, expected at most {limit}, {which}. Give a smaller number, "
        "a smaller --seqlen or a longer text."
    )


def test_the_default_window_is_the_models_context_where_that_is_short(artifact: Path) -> None:
    assert evaluate(artifact, EvalRequest(TEXT, first=1))["seqlen"] == 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "  \n",
            "--text: got {path} with no text in it. Give a file with at least a few thousand words.",
        ),
        (
            "word",
            "--text: got {path} with {tokens} tokens, expected at least one window of 64. Give "
            "a longer text, or --seqlen {tokens}.",
        ),
        (None, "--text: got no such file {path}, expected a text file. Check the path."),
        (b"\xff\xfd\x01", None),
    ],
)
def test_bad_texts(
    artifact: Path, tmp_path: Path, content: str | bytes | None, message: str | None
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        evaluate(artifact, EvalRequest(path, seqlen=64))
    if message is None:
        assert (
            str(error.value).startswith(f"{path}: got a file that is not UTF-8 text (")
            and error.value.fix == "Save it as UTF-8"
        )
        return
    tokens = len(
        read_quant(artifact / "quant").tokenizer()("word", add_special_tokens=False)["input_ids"]
    )
    assert str(error.value) == message.format(path=path, tokens=tokens)


def test_a_window_longer_than_the_context(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        evaluate(artifact, EvalRequest(TEXT, seqlen=257))
    assert (
        str(error.value)
        == "--seqlen: got 257, expected at most 256, the context with native. Give a "
        "smaller --seqlen."
    )


def test_a_packed_text_has_the_same_perplexity(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(TEXT.read_bytes()))
    plain, packed = (evaluate(artifact, EvalRequest(one, first=2)) for one in (TEXT, path))
    assert plain | {"seconds": 0} == packed | {"seconds": 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_a_failed_check(artifact: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    from exporter.proof import perplexity as module

    monkeypatch.setattr(module, "window_nll", lambda session, window: bad)
    with pytest.raises(CheckError) as error:
        evaluate(artifact, EvalRequest(TEXT, first=1, seqlen=64))
    assert str(error.value) == (
        f"window 0: got a mean negative log-likelihood of {bad}, expected a finite perplexity. "
        "The model is broken: look at the report's first bad layer."
    )
