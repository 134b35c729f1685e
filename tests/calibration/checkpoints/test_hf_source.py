"""Weights of Hugging Face folders: one file, shards, .bin files, and what is missing or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.checkpoints.huggingface import open_hf_weights
from plugins.errors import InputError


def test_shards_and_single_file_hold_the_same(tiny_llama: Callable[..., Path]) -> None:
    single, sharded = open_hf_weights(tiny_llama()), open_hf_weights(tiny_llama(shard_size="100KB"))
    assert len(single.files) == 1 and len(sharded.files) > 2
    assert single.shapes() == sharded.shapes()
    for name in single.shapes():
        np.testing.assert_array_equal(single.array(name), sharded.array(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bin_files(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype)
    torch.save(
        {"a.weight": weight, "b.weight": weight.T, "step": 3}, tmp_path / "pytorch_model.bin"
    )
    weights = open_hf_weights(tmp_path)
    assert weights.shapes() == {"a.weight": (4, 6), "b.weight": (6, 4)}
    np.testing.assert_array_equal(
        weights.array("a.weight").astype(np.float32), weight.float().numpy()
    )
    np.testing.assert_array_equal(
        weights.array("b.weight").astype(np.float32), weight.float().numpy().T
    )


def test_bin_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": Evil()}, path)
    with pytest.raises(InputError) as caught:
        open_hf_weights(tmp_path)
    assert caught.value.where == str(path)
    assert (
        caught.value.fix
        == "It is damaged or not plain tensors: download it again, or convert it to safetensors"
    )


def test_truncated_bin_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError) as caught:
        open_hf_weights(tmp_path)
    assert caught.value.where == str(path) and caught.value.problem.startswith(
        "got an unreadable PyTorch file ("
    )


def test_missing_shard_is_named(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama(shard_size="100KB"), tmp_path / "model")
    files = sorted(folder.glob("*.safetensors"))
    files[1].unlink()
    with pytest.raises(InputError) as caught:
        open_hf_weights(folder)
    assert str(caught.value) == (
        f"{folder}: got {len(files) - 1} of the {len(files)} weight files in "
        f"model.safetensors.index.json, missing "
        f"{files[1].name}. "
        "The download is incomplete: fetch the missing files."
    )


def test_index_without_map(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(InputError) as caught:
        open_hf_weights(tmp_path)
    assert (
        str(caught.value)
        == f"{path}: got no weight_map, expected {{tensor: file}}. Download the index again."
    )


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_hf_weights(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: got no weights, expected model.safetensors, model.safetensors.index.json or "
        "pytorch_model.bin. Check that the download is complete."
    )
