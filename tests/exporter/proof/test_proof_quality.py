"""The quality against the float model: as whole logits give it, and on which text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.data import default_text
from calibration.progress import NullProgress
from calibration.quant.folder import read_quant
from calibration.reference.model import FloatReference, float_model, quantised_model
from exporter.proof import quality
from exporter.proof.options import ValidateOptions
from exporter.proof.perplexity import EvalRequest
from exporter.proof.prove import _calibrated_on, prove


class Counter(NullProgress):
    done = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps


def test_it_is_what_whole_logits_give(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "CHUNK", 7)  # 19 predictions: two whole pieces and a rest
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    quant, progress = read_quant(tiny_quant(3, 8) / "quant"), Counter()
    windows = np.random.default_rng(0).integers(0, 512, (2, 20))
    found = quality.measure_quality(checkpoint, quant, windows, "text", progress)
    assert progress.done == quality.quality_steps(windows) == 6
    logs, samples = [], []
    for model in (FloatReference(float_model(checkpoint)), quantised_model(quant)):
        logits = model(torch.from_numpy(windows)).logits[:, :-1].double()
        logs.append(logits.log_softmax(-1).numpy())
        tokens = windows[:1, :16]
        for _ in range(24):
            last = model(torch.from_numpy(tokens)).logits[:, -1:].argmax(-1)
            tokens = np.concatenate([tokens, last.numpy()], 1)
        samples.append(quant.tokenizer().decode(tokens[0, 16:].tolist(), skip_special_tokens=True))
    nll = [-np.take_along_axis(log, windows[:, 1:, None], -1).mean() for log in logs]
    assert [found.float_ppl, found.ppl] == pytest.approx(np.exp(nll).tolist(), rel=1e-4)
    assert found.kl == pytest.approx(
        (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean(), rel=1e-3
    )
    assert found.top1 == (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    assert [found.float_sample, found.sample] == samples
    assert (found.tokens, found.windows, found.seqlen, found.chance) == (38, 2, 20, 512)


def test_both_samples_end_with_the_context(
    tiny_quant: Callable[..., Path], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    continued = quality._continued

    def counted(*arguments: Any) -> list[int]:
        lengths.append(len(tokens := continued(*arguments)))
        return tokens

    monkeypatch.setattr(quality, "_continued", counted)
    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    quant = read_quant(tiny_quant(3, 8) / "quant")
    windows = np.random.default_rng(0).integers(0, 512, (1, 20))
    quality.measure_quality(checkpoint, quant, windows, "text", NullProgress(), max_context=20)
    assert lengths == [4, 4]


def test_the_scored_text_or_the_proofs(
    tiny_export: Callable[..., Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    most_windows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporter.proof.prove._MOST_ROWS", most_windows)
    out, progress = tiny_export(), NullProgress()
    text = tmp_path / "held_out.txt"
    text.write_text(default_text(), encoding="utf-8")
    options = ValidateOptions(tokens=12, steps=0, model=str(tiny_model_dir))
    own = prove(out, {}, options, None, progress)[1]["quality"]
    assert (own["text"], own["windows"], own["seqlen"]) == ("the project's default text", 16, 12)
    assert own["seen"] is False  # rounding looks at no text
    scored = EvalRequest(text, first=2, seqlen=32)
    other = prove(out, {}, options, scored, progress)[1]["quality"]
    assert (other["text"], other["windows"], other["seqlen"]) == ("held_out.txt", 2, 32)
    for left_out in (ValidateOptions(tokens=12, steps=0),):  # no float model
        assert prove(out, {}, left_out, None, progress)[1]["quality"] is None


@pytest.mark.parametrize(
    ("calibration", "calib", "request_", "seen"),
    [
        ({"windows": [4, 32]}, None, {}, True),
        ({"windows": [4, 32]}, None, {"calib": "default"}, True),
        ({"windows": [4, 32]}, "a.txt", {"calib": "a.txt"}, True),
        ({"windows": [4, 32]}, "b.txt", {"calib": "a.txt"}, False),
        ({}, None, {}, False),
    ],
)
def test_whether_calibration_has_seen_the_text(
    monkeypatch: pytest.MonkeyPatch,
    calibration: dict[str, Any],
    calib: str | None,
    request_: dict[str, Any],
    seen: bool,
) -> None:
    quant = SimpleNamespace(calibration=calibration)
    monkeypatch.setattr("calibration.quant.folder.read_quant", lambda path, verify: quant)
    options = ValidateOptions(calib=calib)
    assert _calibrated_on(Path("out"), {"request": request_}, options) is seen
