"""Perplexity, agreement and divergence: known values, an independent computation, every kind of
folder, every message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality
from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.data import default_text
from calibration.quant.folder import read_quant
from calibration.reference.model import FloatReference, float_model, quantised_model
from plugins.errors import CheckError, InputError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(default_text(), encoding="utf-8")
    return path


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_known_values() -> None:
    total = quality.Quality()
    reference = logs([0.5, 0.25, 0.25], [0.1, 0.2, 0.7])
    total.add(reference, logs([0.25, 0.5, 0.25], [0.2, 0.2, 0.6]), torch.tensor([0, 2]))
    # By hand: 0.5 ln 2 - 0.25 ln 2, and 0.1 ln 0.5 + 0.7 ln(7/6).
    divergence = 0.25 * math.log(2) - 0.1 * math.log(2) + 0.7 * math.log(7 / 6)
    assert (total.tokens, total.same) == (2, 1)
    assert total.nll == pytest.approx(-math.log(0.25) - math.log(0.6), rel=1e-14)
    assert total.divergence == pytest.approx(divergence, rel=1e-14)
    assert total.means("model") == pytest.approx(
        {"ppl": (0.25 * 0.6) ** -0.5, "top1": 0.5, "kl": divergence / 2}, rel=1e-14
    )


def test_divergence_has_a_direction() -> None:
    one, other, targets = logs([0.9, 0.1]), logs([0.5, 0.5]), torch.tensor([0])
    forth, back = quality.Quality(), quality.Quality()
    forth.add(one, other, targets)
    back.add(other, one, targets)
    assert forth.divergence == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-13)
    assert back.divergence == pytest.approx(0.5 * math.log(1 / 1.8) + 0.5 * math.log(5), rel=1e-13)


def test_identical_distributions_diverge_by_exactly_zero_and_always_agree() -> None:
    same = torch.randn(
        50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).log_softmax(-1)
    total = quality.Quality()
    total.add(same, same.clone(), torch.zeros(50, dtype=torch.long))
    assert (total.tokens, total.same, total.divergence) == (50, 50, 0.0)


def test_a_model_that_computes_nan_is_refused() -> None:
    total = quality.Quality()
    total.add(logs([0.5, 0.5]), logs([math.nan, math.nan]), torch.tensor([0]))
    with pytest.raises(CheckError) as caught:
        total.means("broken")
    assert str(caught.value) == (
        "broken: got a mean negative log-likelihood of nan and a divergence of nan, expected numbers. "
        "The model is broken: quantise it again, and look at its report."
    )


def independent(
    float_logits: np.ndarray, logits: np.ndarray, windows: np.ndarray
) -> dict[str, float]:
    """The three means in numpy, from whole logits [n, L, V]."""

    def log_probabilities(values: np.ndarray) -> np.ndarray:
        wide = values[:, :-1].astype(np.float64)
        shifted = wide - wide.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    reference, found = log_probabilities(float_logits), log_probabilities(logits)
    nll = -np.take_along_axis(found, windows[:, 1:, None], -1).mean()
    return {
        "ppl": float(np.exp(nll)),
        "top1": float((reference.argmax(-1) == found.argmax(-1)).mean()),
        "kl": float((np.exp(reference) * (reference - found)).sum(-1).mean()),
    }


def test_score_is_what_whole_logits_give(
    tiny_model_dir: Path, tiny_quant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "CHUNK", 7)  # 19 predictions: two whole pieces and a rest
    windows = np.random.default_rng(0).integers(0, 512, (2, 20))
    models = {
        "float": FloatReference(float_model(open_checkpoint(str(tiny_model_dir), offline=True))),
        "w3a8": quantised_model(read_quant(tiny_quant(3, 8) / "quant"), round_activations=False),
    }
    totals = quality.score(models, windows)
    with torch.no_grad():
        float_logits, logits = (
            model(torch.from_numpy(windows)).logits.numpy() for model in models.values()
        )
    assert totals["float"].tokens == totals["w3a8"].tokens == 38
    got, expected = totals["w3a8"].means("w3a8"), independent(float_logits, logits, windows)
    assert expected["kl"] > 0.001 and 0 < expected["top1"] < 1
    assert got == pytest.approx(expected, rel=1e-4)
    assert totals["float"].means("float") == pytest.approx(
        {**independent(float_logits, float_logits, windows), "kl": 0.0}, rel=1e-4
    )


def test_command_scores_artefacts_and_hugging_face_folders(
    tiny_model_dir: Path,
    tiny_quant: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub, file = tmp_path / "hub", tmp_path / "result.json"
    hub.mkdir()
    for path in tiny_model_dir.iterdir():
        (hub / path.name).symlink_to(path)
    out = tiny_quant(8, 8)
    code = quality.main(
        [
            str(out),
            "--hf-folder",
            str(hub),
            "--text",
            str(text),
            "--first",
            "2",
            "--seqlen",
            "64",
            "--model",
            str(tiny_model_dir),
            "--json",
            str(file),
        ]
    )
    assert code == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, float]] = result["rows"]
    assert list(rows) == ["float", out.name, "hub"]
    assert (result["windows"], result["seqlen"], result["tokens"], result["text"]) == (
        2,
        64,
        126,
        "held_out.txt",
    )
    assert rows["hub"] == pytest.approx(
        {"ppl": rows["float"]["ppl"], "top1": 1.0, "kl": 0.0}, rel=1e-6, abs=1e-9
    )
    assert 0 < rows[out.name]["kl"] < 0.1 and 0.9 < rows[out.name]["top1"] <= 1
    assert capsys.readouterr().out == f"{quality.table(rows)}\nwritten to {file}\n"


def test_table() -> None:
    rows = {
        "float": {"ppl": 20.97, "top1": 1.0, "kl": 0.0},
        "w4a8": {"ppl": 12345.678, "top1": 0.61234, "kl": 0.123456},
    }
    assert quality.table(rows) == (
        "           perplexity     top-1   KL, nats\n"
        "float         20.9700   100.00%    0.00000\n"
        "w4a8      12,345.6780    61.23%    0.12346"
    )


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_folders_that_cannot_be_compared(
    tiny_model_dir: Path,
    tiny_quant: Callable[..., Path],
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
) -> None:
    checkpoint, out = open_checkpoint(str(tiny_model_dir), offline=True), tiny_quant(8, 8)
    assert message(lambda: quality.open_models(checkpoint, [out, out], [])) == (
        f"{out}: got a second model named {out.name}, expected different names. Rename the folder."
    )
    assert message(lambda: quality.open_models(checkpoint, [], [tmp_path])) == (
        f"{tmp_path}: got no config.json in it, expected a Hugging Face model folder. Check the path."
    )
    other = tiny_llama(vocab_size=640)
    assert message(lambda: quality.open_models(checkpoint, [], [other])) == (
        f"{other}: got a vocabulary of 640 tokens, expected the 512 of {checkpoint.name}. "
        "Give the float model it was made from with --model."
    )


def test_a_folder_that_needs_a_missing_package(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ImportError("compressed_tensors is not installed\nand more lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    assert message(lambda: quality.open_models(checkpoint, [], [tiny_model_dir])) == (
        f"{tiny_model_dir}: got a model that needs a package which is not there "
        f"(compressed_tensors is not installed). "
        "Run this script with the Python that wrote the folder."
    )
