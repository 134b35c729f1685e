"""Reads the weights of a Hugging Face folder, sharded or not, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.checkpoints.safetensors import read_header, read_tensor
from calibration.out.json_file import read_json
from plugins.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BinWeights",
    "SafetensorsWeights",
    "WeightSource",
    "open_hf_weights",
    "read_source_json",
]


class WeightSource(Protocol):
    """Tensors by Hugging Face name."""

    @property
    def files(self) -> list[Path]:
        """The weight files, in name order."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""

    def array(self, name: str) -> np.ndarray:
        """One tensor in the type it is stored in (GGUF: dequantised to fp32)."""


class SafetensorsWeights:
    """One or several .safetensors files; every header is checked against its file when opened."""

    def __init__(self, files: list[Path]) -> None:
        self.files = sorted(files)
        self._entries = {
            name: (path, entry) for path in self.files for name, entry in read_header(path).items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, (_, entry) in self._entries.items()}

    def array(self, name: str) -> np.ndarray:
        """A view of the file."""
        return read_tensor(*self._entries[name])


class BinWeights:
    """pytorch_model*.bin files, memory-mapped; only plain tensors are unpickled."""

    def __init__(self, files: list[Path]) -> None:
        self.files = sorted(files)
        self._tensors: dict[str, torch.Tensor] = {}
        for path in self.files:
            self._tensors.update(_load_bin(path))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def array(self, name: str) -> np.ndarray:
        """A view of the file."""
        import ml_dtypes
        import torch

        tensor = self._tensors[name].contiguous()
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(tensor.numpy())


def _load_bin(path: Path) -> dict[str, Any]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign pickle
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            str(path),
            f"got an unreadable PyTorch file ({reason})",
            "It is damaged or not plain tensors: download it again, or convert it to safetensors",
        ) from None
    return {
        str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)
    }


def read_source_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        InputError: it is truncated or damaged.
    """
    return read_json(path, "It is truncated or damaged: download it again")


def open_hf_weights(folder: Path) -> WeightSource:
    """The weights of a folder: an index with its shards, or a single file; safetensors before .bin.

    Raises:
        InputError: no weights, a shard of the index is missing, or a file is damaged.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        files = _weight_files(folder, stem, suffix)
        if files:
            return SafetensorsWeights(files) if suffix == "safetensors" else BinWeights(files)
    raise InputError(
        str(folder),
        "got no weights, expected model.safetensors, model.safetensors.index.json or "
        "pytorch_model.bin",
        "Check that the download is complete",
    )


def _weight_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    index = folder / f"{stem}.{suffix}.index.json"
    if not index.is_file():
        single = folder / f"{stem}.{suffix}"
        return [single] if single.is_file() else []
    weight_map = read_source_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            str(index), "got no weight_map, expected {tensor: file}", "Download the index again"
        )
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise InputError(
            str(folder),
            f"got {len(names) - len(missing)} of the {len(names)} weight files in {index.name}, "
            f"missing {shown}",
            "The download is incomplete: fetch the missing files",
        )
    return [folder / name for name in names]
