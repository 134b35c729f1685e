"""Activations of all calibration windows: in memory while they fit, in a file beyond that, read and
written one window at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calibration.reference.fake_quant import Activation
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["ActivationWindows", "StreamBudget", "Windows"]

_NUMPY = {torch.float32: np.float32, torch.int8: np.int8}


class StreamBudget:
    """Hands out room for activations: at most `limit` bytes of memory at a time, the rest in
    temporary files.

    Args:
        limit: bytes; None never spills.
        folder: where the files go; they have no name on the disk and vanish with the process.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self.held = self.peak = self.spilled = 0

    def take(self, nbytes: int) -> bool:
        """Whether this much may stay in memory; counted if so."""
        if self._limit is not None and self.held + nbytes > self._limit:
            self.spilled += nbytes
            return False
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        return True

    def windows(
        self,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Windows:
        """Room for `count` tensors of one shape."""
        return Windows(self, (count, *shape), dtype, device)

    def file(self) -> tempfile._TemporaryFileWrapper[bytes]:
        """An unnamed file on the disk of `folder`."""
        return tempfile.TemporaryFile(dir=self._folder)  # type: ignore[return-value]


class Windows:
    """A sequence of tensors of one shape that live in memory or in a file; items come to, and leave
    from, `device`.
    """

    def __init__(
        self, budget: StreamBudget, shape: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> None:
        self.shape, self.device, self._dtype, self._budget = shape, device, dtype, budget
        self.item_bytes = prod(shape[1:]) * dtype.itemsize
        self._written = bytearray(shape[0])
        self._in_memory = budget.take(shape[0] * self.item_bytes)
        if self._in_memory:
            self._data = torch.empty(
                shape, dtype=dtype
            )  # in one piece: single windows between passing tensors would tear the heap
        else:
            self._file = budget.file()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """Window `index` [L, K]; it may be the memory itself: do not change it in place, and not
        use it after writing another there.
        """
        assert self._written[index], "read before it was written"
        if self._in_memory:
            return self._data[index].to(self.device)
        self._file.seek(index * self.item_bytes)
        data = np.frombuffer(bytearray(self._file.read(self.item_bytes)), _NUMPY[self._dtype])
        return torch.from_numpy(data).reshape(self.shape[1:]).to(self.device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        value = value.detach().to("cpu", self._dtype)
        self._written[index] = 1
        if self._in_memory:
            self._data[index] = value
        else:
            try:
                self._file.seek(index * self.item_bytes)
                self._file.write(memoryview(value.contiguous().numpy()).cast("B"))
                self._file.flush()
            except OSError as error:
                needed = f"expected room for {self.shape[0] * self.item_bytes} bytes"
                raise InputError(
                    "activations on the disk",
                    f"got {error.strerror}, {needed}",
                    "Free some space or raise --max-memory, and go on with --resume",
                ) from error

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Give the room back."""
        if self._in_memory:
            self._budget.held -= self._data.nbytes
            self._data = torch.empty(0, dtype=self._dtype)
        else:
            self._file.close()


class ActivationWindows:
    """Quantised inputs of one site: codes in int8 (A16: floats), with scales and zeros, each as
    Windows.

    Args:
        shape: [L, K] of a window.
        scheme: how the site's activations are quantised.
    """

    def __init__(
        self,
        budget: StreamBudget,
        count: int,
        shape: tuple[int, int],
        scheme: QuantScheme,
        device: str,
    ) -> None:
        quantised = scheme.abits < 16
        parts = {"codes": True, "scale": quantised, "zero": quantised and not scheme.act_symmetric}
        self._count = count
        self._parts = {
            name: budget.windows(
                count,
                shape if name == "codes" else (shape[0], 1),
                torch.int8 if name == "codes" and quantised else torch.float32,
                device,
            )
            for name, there in parts.items()
            if there
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Activation:
        return Activation(**{name: windows[index] for name, windows in self._parts.items()})

    def __setitem__(self, index: int, value: Activation) -> None:
        for name, windows in self._parts.items():
            windows[index] = getattr(value, name)

    def __iter__(self) -> Iterator[Activation]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Give the room back."""
        for windows in self._parts.values():
            windows.close()
