"""Reads what a .gguf file says of itself, metadata and the places of its tensors, without believing
any of it before the file is long enough.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from calibration.checkpoints.foreign import DOWNLOAD_AGAIN
from calibration.out.regular import check_regular
from plugins.errors import InputError

__all__ = ["ANOTHER_TYPE", "GgufPart", "GgufTensor"]

ANOTHER_TYPE = "Convert the model to another GGUF type, such as Q8_0 or F16"

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, two counts, the metadata,
# the tensors' names, sizes and places, then, from the next multiple of general.alignment, their data.
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counted in 32 bits
_SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"
    }.items()
}  # fmt: skip
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_COUNT = struct.Struct("<Q")
_WORD = struct.Struct("<I")
_LEAST_ENTRY = 8 + 4 + 1  # bytes of a metadata entry: the key's length, the type, a value
_LEAST_INFO = 8 + 4 + 4 + 8  # of a tensor's: the name's length, dimensions, the type, the offset
_MOST_ENTRIES, _MOST_TENSORS = 1 << 16, 1 << 15  # 1024 layers have some 12,000 tensors
_MOST_STRINGS = 1 << 21  # in all lists; tokens and merges are the longest, under a million together
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 16
_SHOWN = 60  # characters of a name in a message


@dataclass(frozen=True)
class GgufTensor:
    """A tensor and where it lies.

    Attributes:
        type: how its weights are stored.
        shape: outermost dimension first.
        data: its bytes, uint8 [..., bytes of a row]; pages are read when touched.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class _Array:
    kind: int
    count: int
    start: int


class GgufPart:
    """One .gguf file.

    Attributes:
        path: of the file.
        values: metadata by key, without the arrays.
        tensors: by name, in the file's order.

    Raises:
        InputError: no regular file, no GGUF file, of another byte order or version, truncated,
            damaged, or with tensors that do not fill its data section.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self._arrays: dict[str, _Array] = {}
        self._strings = 0
        self._bytes, self._position = _map(path), len(_MAGIC)
        self._check_version()
        tensors, entries = self._number(_COUNT), self._number(_COUNT)
        self._ahead(entries * _LEAST_ENTRY + tensors * _LEAST_INFO)
        self._at_most(_MOST_ENTRIES, entries, "metadata entries")
        self._at_most(_MOST_TENSORS, tensors, "tensors")
        for _ in range(entries):
            self._read_entry()
        self.tensors = self._place(list(self._infos(tensors)))

    def value(self, key: str, default: Any = None) -> Any:
        """One value of the metadata, or the default if there is none.

        Raises:
            InputError: it is a list, or a number that is not finite.
        """
        if key in self._arrays:
            raise self._damaged(
                f"got a list of {self._arrays[key].count}, expected one value", _metadata(key)
            )
        value = self.values.get(key, default)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._damaged(f"got {value}, expected a finite number", _metadata(key))
        return value

    def strings(self, key: str) -> list[str] | None:
        """A list of strings of the metadata, or None if there is none."""
        array = self._arrays.get(key)
        if array is None or array.kind != _STRING:
            return None
        return [self._text(start, length, key) for start, length in self._spans(array)]

    def numbers(self, key: str) -> list[Any] | None:
        """A list of numbers of the metadata, or None if there is none.

        Raises:
            InputError: one of them is not finite.
        """
        array = self._arrays.get(key)
        if array is None or array.kind == _STRING:
            return None
        scalar = _SCALARS[array.kind]
        data = self._bytes[array.start : array.start + array.count * scalar.size]
        numbers = [value for (value,) in scalar.iter_unpack(data)]
        wrong = next((value for value in numbers if not math.isfinite(value)), None)
        if wrong is not None:
            raise self._damaged(f"got {wrong}, expected finite numbers", _metadata(key))
        return numbers

    @property
    def keys(self) -> list[str]:
        """Every key of the metadata, those of lists too."""
        return [*self.values, *self._arrays]

    def length(self, key: str) -> int | None:
        """How long a list of the metadata is, or None if there is none."""
        array = self._arrays.get(key)
        return None if array is None else array.count

    # ------------------------------------------------------------ bytes

    def _damaged(self, problem: str, place: str = "") -> InputError:
        return InputError(f"{self.path}{place}", problem, DOWNLOAD_AGAIN)

    def _ahead(self, count: int) -> int:
        """Where `count` bytes begin that are known to be in the file."""
        end = self._position + count
        if end > len(self._bytes):
            raise self._damaged(f"got {len(self._bytes)} bytes, expected at least {end}")
        return self._position

    def _at_most(self, most: int, count: int, what: str) -> None:
        if count > most:
            raise self._damaged(f"got {count} {what}, expected at most {most}")

    def _skip(self, count: int) -> int:
        start = self._ahead(count)
        self._position += count
        return start

    def _number(self, kind: struct.Struct) -> Any:
        return kind.unpack_from(self._bytes, self._skip(kind.size))[0]

    def _name(self) -> str:
        length = self._number(_COUNT)
        return self._text(self._skip(length), length, "")

    def _text(self, start: int, length: int, key: str) -> str:
        try:
            return self._bytes[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("got text that is not UTF-8", _metadata(key)) from None

    # ------------------------------------------------------------ metadata

    def _check_version(self) -> None:
        version = self._number(_WORD)
        if version and version & 0xFFFF == 0:  # such as 3, its bytes the other way round
            raise InputError(
                str(self.path),
                "got a big-endian GGUF file, expected a little-endian one",
                "Convert it with gguf-convert-endian of the package gguf, or download the other one",
            )
        if version not in _VERSIONS:
            raise InputError(
                str(self.path),
                f"got GGUF version {version}, expected {' or '.join(map(str, _VERSIONS))}",
                "Convert the model to GGUF again",
            )

    def _read_entry(self) -> None:
        key = self._name()
        if key in self.values or key in self._arrays:
            raise self._damaged("got this key twice, expected it once", _metadata(key))
        kind = self._number(_WORD)
        if kind == _ARRAY:
            self._arrays[key] = self._array(key)
        elif kind == _STRING:
            length = self._number(_COUNT)
            self.values[key] = self._text(self._skip(length), length, key)
        else:
            self.values[key] = self._scalar(kind, key)

    def _scalar(self, kind: int, key: str) -> Any:
        if kind not in _SCALARS:
            raise self._damaged(f"got value type {kind}, expected 0 to 12", _metadata(key))
        value = self._number(_SCALARS[kind])
        if kind == _BOOL:
            if value > 1:
                raise self._damaged(f"got the boolean {value}, expected 0 or 1", _metadata(key))
            return bool(value)
        # The shortest decimal that is this fp32: 1e-5, as the model's config says, and not
        # 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self, key: str) -> _Array:
        kind, count = self._number(_WORD), self._number(_COUNT)
        if kind == _STRING:
            self._ahead(count * _COUNT.size)
            self._strings += count
            self._at_most(_MOST_STRINGS, self._strings, "strings in its lists")
            array = _Array(kind, count, self._position)
            for start, length in self._spans(array):
                self._position = start
                self._skip(length)
            return array
        if kind not in _SCALARS:
            got = "an array of arrays" if kind == _ARRAY else f"an array of type {kind}"
            raise self._damaged(f"got {got}, expected one of numbers or strings", _metadata(key))
        return _Array(kind, count, self._skip(count * _SCALARS[kind].size))

    def _spans(self, array: _Array) -> Iterator[tuple[int, int]]:
        """Start and length of each string."""
        data, unpack, position = self._bytes, _COUNT.unpack_from, array.start
        last = len(data) - _COUNT.size
        for _ in range(array.count):
            if position > last:
                raise self._damaged(
                    f"got {len(data)} bytes, expected at least {position + _COUNT.size}"
                )
            (length,) = unpack(data, position)
            yield position + _COUNT.size, length
            position += _COUNT.size + length

    # ------------------------------------------------------------ tensors

    def _infos(
        self, count: int
    ) -> Iterator[tuple[str, GGMLQuantizationType, tuple[int, ...], int]]:
        """Name, type, shape and offset of each tensor."""
        for _ in range(count):
            name = self._name()
            dimensions = self._number(_WORD)
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise self._damaged(
                    f"got {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}", _tensor(name)
                )
            shape = tuple(self._number(_COUNT) for _ in range(dimensions))[::-1]
            kind = self._type(self._number(_WORD), name)
            yield name, kind, shape, self._number(_COUNT)

    def _type(self, code: int, name: str) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(code)
        except ValueError:
            raise InputError(
                f"{self.path}{_tensor(name)}",
                f"got type {code}, expected one that the package gguf knows",
                ANOTHER_TYPE,
            ) from None

    def _place(
        self, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]]
    ) -> dict[str, GgufTensor]:
        """The tensors, each of which begins where the one before it ends."""
        alignment = self._alignment()
        base = _aligned(self._position, alignment)
        tensors: dict[str, GgufTensor] = {}
        expected = end = 0
        for name, kind, shape, offset in infos:
            block, size = GGML_QUANT_SIZES[kind]
            if name in tensors:
                raise self._damaged("got this tensor twice, expected it once", _tensor(name))
            if 0 in shape or shape[-1] % block:
                raise self._damaged(
                    f"got shape {list(shape)}, expected rows of blocks of {block} as type "
                    f"{kind.name} has them",
                    _tensor(name),
                )
            if offset != expected:
                raise self._damaged(
                    f"got its data at offset {offset}, expected {expected}, where the tensors "
                    "before it end",
                    _tensor(name),
                )
            end = offset + math.prod(shape) // block * size
            if base + end > len(self._bytes):
                raise self._damaged(f"got {len(self._bytes)} bytes, expected at least {base + end}")
            expected = _aligned(end, alignment)
            rows = (*shape[:-1], shape[-1] // block * size)
            data = np.frombuffer(self._bytes, np.uint8, end - offset, base + offset).reshape(rows)
            tensors[name] = GgufTensor(kind, shape, data)
        if len(self._bytes) > base + expected:
            raise self._damaged(
                f"got {len(self._bytes)} bytes, expected at most {base + expected} from its header"
            )
        return tensors

    def _alignment(self) -> int:
        value = self.value("general.alignment", 32)
        if type(value) is not int or not 0 < value <= _MOST_ALIGNMENT or value & (value - 1):
            raise self._damaged(
                f"got {str(value)[:_SHOWN]!r}, expected a power of two of at most {_MOST_ALIGNMENT}",
                _metadata("general.alignment"),
            )
        return value


def _metadata(key: str) -> str:
    return f", metadata {key[:_SHOWN]}" if key else ""


def _tensor(name: str) -> str:
    return f", tensor {name[:_SHOWN]}"


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _map(path: Path) -> mmap.mmap:
    """The bytes of a file that begins as GGUF files do."""
    check_regular(path, "a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
            if magic != _MAGIC:
                raise InputError(
                    str(path),
                    f"got first bytes {magic!r}, expected {_MAGIC!r}",
                    "This is not a GGUF file: check the download",
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(
            str(path),
            f"got {error.strerror}, expected a GGUF file",
            "Check the path and the permissions",
        ) from None
