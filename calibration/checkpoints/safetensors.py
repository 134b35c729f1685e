"""Reads and writes .safetensors one tensor at a time, as numpy arrays, checking the header against
the file before any work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from calibration.out.json_file import Count, checked
from calibration.out.regular import check_regular
from plugins.errors import InputError
from plugins.text import shown

__all__ = [
    "SafetensorsWriter",
    "TensorEntry",
    "TensorSpec",
    "dtype_name",
    "numpy_dtype",
    "read_header",
    "read_tensor",
]

# https://huggingface.co/docs/safetensors: 8 bytes header length (little endian), JSON header, then
# the tensors without gaps.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_AGAIN = "The file is truncated or damaged: download or make it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a file: safetensors type name, shape, first and past-the-end byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: HF name, numpy dtype, shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Info:
    """What a header says of a tensor."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """float16, bfloat16 or float32 as a numpy dtype."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """What safetensors calls a numpy dtype, such as BF16."""
    return _NAMES[dtype]


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(str(path), problem, _AGAIN)


def _header_bytes(path: Path, size: int) -> tuple[bytes, int]:
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise InputError(
                str(path),
                "got a Git LFS pointer, expected the weights themselves",
                "Run `git lfs pull` in the model folder",
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"got {size} bytes with no safetensors header at the start")
        return file.read(length), 8 + length


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, checked to tile the data section exactly.

    Raises:
        InputError: missing, truncated or corrupt file.
    """
    check_regular(path, "a safetensors file")
    try:
        size = path.stat().st_size
        raw, base = _header_bytes(path, size)
    except OSError as error:
        raise InputError(
            str(path),
            f"got {error.strerror}, expected a safetensors file",
            "Check the path and the permissions",
        ) from None
    try:
        header = json.loads(raw, object_pairs_hook=_without_twins, parse_constant=_refuse)
        metadata = header.pop("__metadata__", None)
        if metadata is not None:
            checked(metadata, dict[str, str], str(path))
        infos = checked(header, dict[str, _Info], str(path))
    except (ValueError, TypeError, AttributeError, RecursionError, InputError):
        raise _damaged(path, "got a safetensors header that is not valid JSON of tensors") from None
    entries = {
        name: TensorEntry(
            info.dtype, tuple(info.shape), *(base + offset for offset in info.data_offsets)
        )
        for name, info in infos.items()
    }
    _check_tiling(path, entries, base, size)
    return entries


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one name, readers take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _check_tiling(path: Path, entries: dict[str, TensorEntry], base: int, size: int) -> None:
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.dtype not in _DTYPES:
            raise InputError(
                f"{path}, tensor {shown(name)}",
                f"got dtype {shown(entry.dtype)}, expected one of {', '.join(_DTYPES)}",
                "Save the checkpoint as float32, float16 or bfloat16",
            )
        wanted = math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        if entry.start != position or entry.end - entry.start != wanted:
            raise _damaged(
                path, f"got a header whose tensor {shown(name)} does not fit its place in the file"
            )
        position = entry.end
    if position != size:
        raise _damaged(path, f"got {size} bytes, expected {position} from its header")


def read_tensor(path: Path, entry: TensorEntry) -> np.ndarray:
    """One tensor as a read-only view of the file; pages are read when touched."""
    dtype = _DTYPES[entry.dtype]
    if entry.end == entry.start:
        return np.zeros(entry.shape, dtype)
    return np.memmap(path, dtype, "r", offset=entry.start, shape=entry.shape)


class SafetensorsWriter:
    """Writes tensors in the order of `specs`; the header is known first, so no tensor needs to stay
    in memory.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._specs = list(specs)
        self._next = 0
        self._path = path

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._path.open("wb")
        self._file.write(self._header())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and self._next != len(self._specs):
            raise RuntimeError(f"{self._path}: {len(self._specs) - self._next} tensors not written")

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in self._specs:
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the data begins on a multiple of 8
        return len(raw).to_bytes(8, "little") + raw

    def write(self, array: np.ndarray) -> None:
        """Write the next tensor of the specs."""
        spec = self._specs[self._next]
        if array.dtype != spec.dtype or array.shape != spec.shape:
            raise RuntimeError(
                f"{spec.name}: got {array.dtype} {array.shape}, planned {spec.dtype} {spec.shape}"
            )
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._next += 1
