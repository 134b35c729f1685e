"""Experts in files: in tensors of their own or stacked as transformers' modules are, missing, and too
few for the config.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from calibration.checkpoints.checkpoint import open_checkpoint
from plugins.errors import InputError
from tests.conftest import FAMILIES

MOE = pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Qwen3-MoE of 6 experts, in layers 0 and 2."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(architecture="Qwen3Moe", **FAMILIES["Qwen3Moe"]), folder)
    return folder


def refusal(folder: Path) -> str:
    """Why a folder is not opened."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder), offline=True)
    return str(caught.value)


def change(folder: Path, drop: Callable[[str], bool]) -> None:
    """Take some tensors out of the file."""
    path = folder / "model.safetensors"
    save_file({name: array for name, array in load_file(path).items() if not drop(name)}, path)


@MOE
def test_stacked_experts_are_the_same_model(
    tiny_llama: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_llama(architecture=name, **FAMILIES[name])
    stacked = tmp_path / "stacked"
    shutil.copytree(folder, stacked)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.save_pretrained(stacked, save_original_format=False)
    stored = load_file(stacked / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].ndim == 3
    one, other = (open_checkpoint(str(path), offline=True) for path in (folder, stacked))
    assert one.decoder.declaration() == other.decoder.declaration()
    for tensor in one.decoder.shapes():
        np.testing.assert_array_equal(other.array(tensor), one.array(tensor), err_msg=tensor)


def test_missing_experts_are_named_by_layer(model: Path) -> None:
    gone = ("layers.2.mlp.experts.1.", "layers.2.mlp.experts.3.", "layers.0.mlp.experts.5.up")
    change(model, lambda name: any(part in name for part in gone))
    assert refusal(model) == (
        f"{model}: got 61 of the 68 tensors its config asks for, missing expert 5 of layer 0, "
        "experts 1, 3 of layer 2. The download is incomplete or the file belongs to another model."
    )


def test_fewer_experts_than_the_config_says(model: Path) -> None:
    change(model, lambda name: ".experts.4." in name or ".experts.5." in name)
    assert refusal(model) == (
        f"{model}: got 56 of the 68 tensors its config asks for, missing experts 4, 5 of layer 0, "
        "experts 4, 5 of layer 2 (experts in the file: 4, in the config: 6). "
        "The file is incomplete or belongs to a smaller model: check the download."
    )


def test_more_experts_than_the_config_says(model: Path) -> None:
    configured(model, num_local_experts=5)
    message = refusal(model)
    assert message == (
        f"{model}, tensor model.layers.0.mlp.gate.weight: got shape [6, 64], expected [5, 64] from "
        "the config. The weights and the config belong to different models: use the config of these "
        "weights."
    )
    change(model, lambda name: name.endswith("mlp.gate.weight"))
    path = model / "model.safetensors"
    router = np.zeros((5, 64), np.float32)
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)]
    save_file(load_file(path) | dict.fromkeys(names, router), path)
    assert refusal(model).startswith(
        f"{model}: got tensors the config does not ask for: "
        "model.layers.0.mlp.experts.5.down_proj.weight"
    )
    assert refusal(model).endswith(
        "The export would drop them: correct num_hidden_layers or num_experts in the config, or save "
        "the model without them."
    )


def configured(folder: Path, **changes: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"num_experts_per_tok": 7},
            "got num_experts_per_tok 7, expected at most the 6 experts of a layer",
        ),
        ({"num_experts_per_tok": 0}, "got num_experts_per_tok 0, expected a whole number above 0"),
        ({"decoder_sparse_step": 0}, "got decoder_sparse_step 0, expected a whole number above 0"),
        ({"mlp_only_layers": ["1"]}, "REFUSED"),
    ],
)
def test_numbers_that_make_no_routes_are_named(
    model: Path, changes: dict[str, Any], problem: str
) -> None:
    configured(model, **changes)
    message = refusal(model)
    if problem == "REFUSED":  # by transformers itself
        assert message.startswith(
            f"{model / 'config.json'}: got a config that transformers refuses"
        )
        return
    assert message == (
        f"{model / 'config.json'}: {problem}. Choose a model without it; this export would "
        "compute something else."
    )
