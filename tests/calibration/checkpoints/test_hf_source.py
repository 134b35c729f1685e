"""Weights of Hugging Face folders: one file, shards, .bin files, and what is missing or damaged."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calibration.checkpoints.huggingface import open_hf_weights
from plugins.errors import InputError

NOT_TENSORS = "It is damaged or not plain tensors: download it again, or convert it to safetensors."


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_hf_weights(folder)
    return str(caught.value)


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
    assert str(caught.value) == (
        f"{path}: got an unreadable PyTorch file (it calls print). {NOT_TENSORS}"
    )


def test_numpy_arrays_in_a_bin_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": np.ones(3)}, path)
    assert refusal(tmp_path) == (
        f"{path}: got an unreadable PyTorch file (it calls numpy._core.multiarray._reconstruct). "
        f"{NOT_TENSORS}"
    )


PARAMETER = torch.nn.Parameter(torch.eye(3))


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (PARAMETER, np.eye(3)),
        (torch.eye(3, dtype=torch.complex64).conj().imag, np.zeros((3, 3))),
        (torch.arange(6).view(2, 3).T.float(), np.arange(6).reshape(2, 3).T),
    ],
    ids=["parameter", "negated", "transposed"],
)
def test_what_a_training_leaves_on_tensors(
    tmp_path: Path, tensor: torch.Tensor, value: np.ndarray
) -> None:
    torch.save({"a.weight": tensor}, tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(open_hf_weights(tmp_path).array("a.weight"), value)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.empty(3, device="meta"), "a tensor without numbers (device meta)"),
        (quantised, "a quantized tensor (qint8)"),
        (lambda: torch.zeros(1).expand(1 << 40), f"shape [{1 << 40}] on 4 bytes"),
    ],
    ids=["sparse", "meta", "quantised", "expanded"],
)
def test_tensors_that_are_not_plain(
    tmp_path: Path, make: Callable[[], torch.Tensor], got: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": make()}, path)
    assert refusal(tmp_path) == (
        f"{path}, a.weight: got {got}, expected a plain tensor. Give the float model."
    )


def test_complex_numbers(tmp_path: Path) -> None:
    tensor = torch.ones(3, dtype=torch.complex64)
    path = tmp_path / "pytorch_model.bin"
    for one in (tensor, tensor.conj()):
        torch.save({"a.weight": one}, path)
        assert refusal(tmp_path) == (
            f"{path}, a.weight: got complex numbers (complex64), expected a plain tensor. Give the "
            "float model."
        )


def test_a_type_that_numpy_does_not_have(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.eye(3).to(torch.float8_e4m3fn)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        open_hf_weights(tmp_path).array("a.weight")
    assert str(caught.value) == (
        f"{tmp_path}, tensor a.weight: got dtype float8_e4m3fn, expected float32, float16 or "
        "bfloat16. Give the float model."
    )


@pytest.mark.parametrize(("value", "kind"), [([torch.eye(3)], "list"), (torch.eye(3), "Tensor")])
def test_a_bin_file_without_names(tmp_path: Path, value: object, kind: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path)
    assert refusal(tmp_path) == (f"{path}: got a {kind}, expected a dict of tensors. {NOT_TENSORS}")


@pytest.mark.parametrize("inner", [{"a.weight": torch.eye(3)}, [[torch.eye(3)]]], ids=str)
def test_tensors_one_level_deeper_are_named(tmp_path: Path, inner: object) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": inner, "step": 3, "args": {"lr": [0.1]}}, path)
    assert refusal(tmp_path) == (
        f"{path}, state_dict: got a {type(inner).__name__} of tensors, expected tensors side by "
        "side. Save what is inside it as the whole file, with safetensors.torch.save_file."
    )


def _repack(path: Path, change: Callable[[str, bytes], tuple[bytes, int]]) -> None:
    """Write a zip archive again with each entry's content and compression changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            data, compression = change(name, data)
            archive.writestr(name, data, compression)


def test_a_compressed_bin_file_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.eye(3)}, path)

    def blow_up(name: str, data: bytes) -> tuple[bytes, int]:
        if name.endswith("data.pkl"):
            return data + bytes(50_000_000), zipfile.ZIP_DEFLATED
        return data, zipfile.ZIP_STORED

    _repack(path, blow_up)
    assert path.stat().st_size < 100_000
    assert refusal(tmp_path) == (
        f"{path}: got a compressed pytorch_model/data.pkl, expected it as torch.save stores it. "
        f"{NOT_TENSORS}"
    )


def test_a_bin_file_that_promises_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.eye(3)}, path)
    with zipfile.ZipFile(path) as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
    whole = path.read_bytes()
    place = whole.rindex(entry.filename.encode()) - 46  # its record in the archive's directory
    sizes = (1 << 31).to_bytes(4, "little") * 2
    path.write_bytes(whole[: place + 20] + sizes + whole[place + 28 :])
    assert refusal(tmp_path) == (
        f"{path}: got entries longer than the {len(whole)} bytes of the file. {NOT_TENSORS}"
    )


def test_a_bin_file_of_before_zip_archives(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.eye(3)}, path, _use_new_zipfile_serialization=False)
    assert refusal(tmp_path) == (
        f"{path}: got an unreadable PyTorch file (File is not a zip file). {NOT_TENSORS}"
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


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/tmp/other.safetensors", "a/b.safetensors", 3, "x" * 5000],
)
def test_an_index_that_leaves_its_folder(tmp_path: Path, name: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a.weight": name}}))
    shown = f"{'x' * 60} ... {'x' * 60}" if len(str(name)) == 5000 else name
    assert refusal(tmp_path) == (
        f"{path}, a.weight: got {shown}, expected the name of a file in this folder. Download the "
        "index again."
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tensor_in_two_shards(tmp_path: Path, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-{number}.{suffix}" for number in (1, 2)]
    for name in names:
        tensors = {"a.weight": torch.eye(3)}
        save = save_file if suffix == "safetensors" else torch.save
        save(tensors, tmp_path / name)
    index = {"weight_map": {"a.weight": names[0], "b.weight": names[1]}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert refusal(tmp_path) == (
        f"{tmp_path / names[1]}, tensor a.weight: got it in {names[0]} too, expected each tensor in "
        "one file. Make the checkpoint again."
    )
