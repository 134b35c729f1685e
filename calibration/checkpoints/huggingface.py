"""Reads the weights of a Hugging Face folder, sharded or not, one tensor at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.checkpoints.foreign import DOWNLOAD_AGAIN, reason
from calibration.checkpoints.safetensors import read_header, read_tensor
from calibration.out.json_file import LARGE, read_json
from calibration.out.regular import check_regular
from plugins.errors import InputError
from plugins.text import shown, some

if TYPE_CHECKING:
    import torch

__all__ = [
    "BinWeights",
    "Place",
    "SafetensorsWeights",
    "WeightSource",
    "open_hf_weights",
]


Place = slice | tuple[int, slice]  # some rows of a tensor, or of one of the matrices in it


class WeightSource(Protocol):
    """Tensors by Hugging Face name."""

    @property
    def files(self) -> list[Path]:
        """The weight files, in name order."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""

    def array(self, name: str, rows: Place | None = None) -> np.ndarray:
        """One tensor, or a part of it alone, in the type it is stored in (GGUF: dequantised to
        fp32).
        """


class SafetensorsWeights:
    """One or several .safetensors files; every header is checked against its file when opened."""

    def __init__(self, files: list[Path]) -> None:
        self.files = sorted(files)
        headers = {path: read_header(path) for path in self.files}
        self._files = _file_of_each(headers)
        self._entries = {name: headers[path][name] for name, path in self._files.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def array(self, name: str, rows: Place | None = None) -> np.ndarray:
        """A view of the file."""
        whole = read_tensor(self._files[name], self._entries[name])
        return whole if rows is None else whole[rows]


class BinWeights:
    """pytorch_model*.bin files, memory-mapped; only plain tensors are unpickled."""

    def __init__(self, files: list[Path]) -> None:
        self.files = sorted(files)
        loaded = {path: _load_bin(path) for path in self.files}
        self._tensors = {name: loaded[path][name] for name, path in _file_of_each(loaded).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def array(self, name: str, rows: Place | None = None) -> np.ndarray:
        """A view of the file."""
        import ml_dtypes
        import torch

        whole = self._tensors[name]
        tensor = (whole if rows is None else whole[rows]).resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        try:
            return np.asarray(tensor.numpy())
        except TypeError:  # numpy has no such type
            raise InputError(
                f"{self.files[0].parent}, tensor {shown(name)}",
                f"got dtype {_dtype(tensor)}, expected float32, float16 or bfloat16",
                "Give the float model",
            ) from None


def _file_of_each(tensors: Mapping[Path, Iterable[str]]) -> dict[str, Path]:
    """{tensor: the file that holds it}.

    Raises:
        InputError: two files do, and each reader takes the one it likes.
    """
    found: dict[str, Path] = {}
    for path, names in tensors.items():
        for name in names:
            if name in found:
                raise InputError(
                    f"{path}, tensor {shown(name)}",
                    f"got it in {found[name].name} too, expected each tensor in one file",
                    "Make the checkpoint again",
                )
            found[name] = path
    return found


# ---------------------------------------------------------------- pytorch_model.bin

_MAX_PICKLE = 100_000_000  # as long as a safetensors header may be
_NAME_MAX = 255  # bytes of a file name, on Linux
_CONVERT = "download it again, or convert it to safetensors"
_NOT_TENSORS = f"It is damaged or not plain tensors: {_CONVERT}"


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    import torch

    _check_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign pickle
        raise InputError(
            str(path), f"got an unreadable PyTorch file ({reason(error)})", _NOT_TENSORS
        ) from None
    if not isinstance(loaded, dict):
        raise InputError(
            str(path), f"got a {type(loaded).__name__}, expected a dict of tensors", _NOT_TENSORS
        )
    tensors = {}
    for name, value in loaded.items():
        where = f"{path}, {shown(name)}"
        if isinstance(value, torch.Tensor):
            tensors[str(name)] = _plain(where, value)
        elif _holds_tensors(value):
            raise InputError(
                where,
                f"got a {type(value).__name__} of tensors, expected tensors side by side",
                "Save what is inside it as the whole file, with safetensors.torch.save_file",
            )
    return tensors


def _check_zip(path: Path) -> None:
    """Look whether what torch will unpack is as small as the file.

    Raises:
        InputError: it is no zip archive, or something in it is compressed, as torch writes nothing.
    """
    check_regular(path, "a PyTorch file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = path.stat().st_size
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(
            str(path), f"got an unreadable PyTorch file ({reason(error)})", _NOT_TENSORS
        ) from None
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    if packed:
        problem = (
            f"got a compressed {shown(packed[0].filename)}, expected it as torch.save stores it"
        )
    elif sum(entry.file_size for entry in entries) > size:
        problem = f"got entries longer than the {size} bytes of the file"
    elif max(pickles, default=0) > _MAX_PICKLE:
        problem = f"got {max(pickles)} bytes of names, expected at most {_MAX_PICKLE}"
    else:
        return
    raise InputError(str(path), problem, _NOT_TENSORS)


def _plain(where: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of numbers in memory, without what a training left on it.

    Raises:
        InputError: it is sparse, nested, complex, quantized, without numbers, or larger than they are.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
    elif tensor.is_complex():
        got = f"complex numbers ({_dtype(tensor)})"
    elif tensor.is_quantized:
        got = f"a quantized tensor ({_dtype(tensor)})"
    elif tensor.device.type != "cpu":
        got = f"a tensor without numbers (device {tensor.device.type})"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        got = f"shape {list(tensor.shape)} on {tensor.untyped_storage().nbytes()} bytes"
    else:
        return tensor.detach()
    raise InputError(where, f"got {got}, expected a plain tensor", "Give the float model")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _holds_tensors(value: Any) -> bool:
    """Whether a container has a tensor at any depth."""
    import torch

    seen, left = set[int](), [value]
    while left:
        one = left.pop()
        if isinstance(one, torch.Tensor):
            return True
        if isinstance(one, (dict, list, tuple, set)) and id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, dict) else one
    return False


def open_hf_weights(folder: Path) -> WeightSource:
    """The weights of a folder: a single file, or an index with its shards; safetensors before .bin.
    This is the order in which transformers looks for them.

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
    single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
    if single.exists() or not index.exists():
        return [single] if single.exists() else []
    weight_map = read_json(index, DOWNLOAD_AGAIN, LARGE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            str(index), "got no weight_map, expected {tensor: file}", "Download the index again"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or len(name.encode()) > _NAME_MAX:
            raise InputError(
                f"{index}, {shown(tensor)}",
                f"got {shown(name)}, expected the name of a file in this folder",
                "Download the index again",
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(
            str(folder),
            f"got {len(names) - len(missing)} of the {len(names)} weight files in {index.name}, "
            f"missing {some(missing)}",
            "The download is incomplete: fetch the missing files",
        )
    return [folder / name for name in names]
