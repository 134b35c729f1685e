"""Results of a proof on the disk, each as soon as it is there: what a killed proof goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from calibration.checkpoints.safetensors import (
    SafetensorsWriter,
    TensorSpec,
    read_header,
    read_tensor,
)
from calibration.out.pieces import Pieces
from calibration.progress import NullProgress, Progress
from plugins.errors import InputError

__all__ = ["SavedResults"]

T = TypeVar("T")

_TREE = "tree"  # the tensor with all but the arrays, which it has numbers for


class SavedResults:
    """What was computed by its name, in a file with its checksum.

    Args:
        pieces: where; None saves nothing, and everything is computed.
        progress: told which steps need not be done, and told once where the disk takes no more.
    """

    def __init__(self, pieces: Pieces | None = None, progress: Progress | None = None) -> None:
        self._pieces, self._progress = pieces, progress or NullProgress()

    def once(
        self, name: str, kind: Any, work: Callable[[], T], steps: int = 1, made_of: str = ""
    ) -> T:
        """A result that was saved, or else what `work` gives, as it will be read again.

        Args:
            name: of the result.
            kind: its type, of what JSON can hold, dataclasses, tuples and numpy arrays.
            work: computes it.
            steps: how far `work` moves the progress.
            made_of: what it depends on besides the pieces' fingerprint.
        """
        pieces, file = self._pieces, f"{name}.safetensors"
        if pieces is None:
            return work()
        if pieces.whole(file, made_of):
            self._progress.skip(steps)
            return cast(T, _read(pieces.folder / file, kind))
        value = work()
        try:
            with pieces.made(file, made_of) as path:
                _write(path, value)
        except (OSError, InputError) as error:
            self._pieces = None
            self._progress.warning(
                f"{pieces.folder / file}: got {getattr(error, 'strerror', None) or error} while "
                "writing. The proof goes on; should it be interrupted, --resume begins here."
            )
            return value
        del value
        return cast(T, _read(pieces.folder / file, kind))

    def digest(self, name: str) -> str:
        """Of a result that was saved; "" of any other."""
        return self._pieces.recorded(f"{name}.safetensors") if self._pieces else ""


def _write(path: Path, value: Any) -> None:
    arrays: list[np.ndarray] = []

    def numbered(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        if not isinstance(item, np.ndarray):
            raise TypeError(f"got {type(item).__name__}, expected a type that `once` lists")
        arrays.append(item)
        return len(arrays) - 1

    tree = np.frombuffer(msgspec.msgpack.encode(value, enc_hook=numbered), np.uint8)
    named = {_TREE: tree, **{str(number): array for number, array in enumerate(arrays)}}
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in named.items()]
    with SafetensorsWriter(path, specs) as file:
        for array in named.values():
            file.write(array)


def _read(path: Path, kind: Any) -> Any:
    entries = read_header(path)

    def array(_: type, number: int) -> np.ndarray:
        return np.array(read_tensor(path, entries[str(number)]))

    tree = read_tensor(path, entries[_TREE]).tobytes()
    return msgspec.msgpack.decode(tree, type=kind, dec_hook=array)
