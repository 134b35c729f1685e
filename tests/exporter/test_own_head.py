"""A model that its config calls tied and whose file holds another head, from the file to logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibration.out.layout import QUANT
from calibration.quant.folder import read_quant
from exporter.proof.options import ValidateOptions
from exporter.proof.validate import validate
from exporter.run.onnxruntime import OnnxSession

QQQ = ("--method", "qqq", "--nsamples", "4", "--seqlen", "32", "--head-bits")


@pytest.mark.slow
@pytest.mark.parametrize("method", [(), (*QQQ, "16"), (*QQQ, "8")])
def test_the_head_of_the_file_makes_the_logits(
    run: Callable[..., tuple[int, str, str]],
    tiny_model_dir: Path,
    tmp_path: Path,
    method: tuple[str, ...],
) -> None:
    model, out = shutil.copytree(tiny_model_dir, tmp_path / "model"), tmp_path / "out"
    tensors = load_file(tiny_model_dir / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(512, 64, generator=torch.manual_seed(1))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    bits = {"wbits": "4", "abits": "8"} if method else {"wbits": "8", "abits": "16"}
    code, _, err = run(out, *method, model=model, **bits)
    assert code == 0, err
    quant = read_quant(out / QUANT)
    assert quant.config["tie_word_embeddings"] is False
    assert quant.config["hf"]["tie_word_embeddings"] is False
    result = validate(out, ValidateOptions(tokens=16, steps=2, model=str(model)))
    assert result.ok, result.first_failure
    name = "lm_head" if method[-1:] == ("8",) else "lm_head.weight"
    assert name in {row.tensor for row in result.rows if row.level == "weights"}

    ids = np.arange(12)[None] * 37 % 512
    session = OnnxSession(out / "onnx", 256)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    error = np.linalg.norm(session.run(ids) - wanted) / np.linalg.norm(wanted)
    session.close()
    assert error < (0.5 if method else 0.02)  # with the embedding as head it is over 1
