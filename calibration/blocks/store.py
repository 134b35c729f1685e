"""Durable results of finished blocks: what a killed calibration goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.pieces import Pieces
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BlockResult", "BlockStore"]


@dataclass(frozen=True)
class BlockResult:
    """A quantised block.

    Attributes:
        sites: stacked codes and scales by site.
        gains: norm gains by name, fp32.
        report: what the method has to say of it, plain JSON: "loss_before", "loss_after", "notes",
            ...
    """

    sites: dict[str, QuantArrays]
    gains: dict[str, np.ndarray]
    report: dict[str, Any] = field(default_factory=dict)

    def lookup(self, site: str, moments: object = None) -> QuantArrays:
        """The finished codes of a site, for `walk`."""
        return self.sites[site]


class BlockStore:
    """One piece per finished block, each made behind the one before it.

    Args: as of Pieces.

    Attributes:
        pieces: the folder.
    """

    def __init__(
        self, folder: Path, fingerprint: str, keep: bool = True, writes: bool = True
    ) -> None:
        self.pieces = Pieces(folder, fingerprint, keep, writes)

    @staticmethod
    def _name(index: int) -> str:
        return f"block-{index:05d}.safetensors"

    def _path(self, index: int) -> Path:
        return self.pieces.folder / self._name(index)

    def digests(self) -> list[str]:
        """SHA-256 of the blocks that are there from the first one on, as they were written: a damaged
        one counts as missing, and so do those that were made behind another one.
        """
        found = list[str]()
        while digest := self.pieces.whole(self._name(len(found)), found[-1] if found else ""):
            found.append(digest)
        return found

    def recorded(self, count: int) -> list[str]:
        """SHA-256 with which the first so many blocks were written; "" of one that never was."""
        return [self.pieces.recorded(self._name(index)) for index in range(count)]

    def save(self, index: int, result: BlockResult) -> None:
        """Put a block on the disk.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        import json

        from safetensors.numpy import save_file

        tensors = {f"gain/{name}": array for name, array in result.gains.items()}
        for site, arrays in result.sites.items():
            tensors |= {f"site/{site}/{name}": array for name, array in arrays.named().items()}
        before = self.pieces.recorded(self._name(index - 1)) if index else ""
        try:
            with self.pieces.made(self._name(index), before) as path:
                save_file(tensors, str(path), {"report": json.dumps(result.report)})
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise InputError(
                str(self._path(index)),
                f"got {error} while writing, expected a writable folder with enough space",
                "Check the disk; finished blocks are whole, go on with --resume",
            ) from error

    def report(self, index: int) -> dict[str, Any]:
        """Of a finished block."""
        import json

        from safetensors import safe_open

        with safe_open(str(self._path(index)), "np") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["report"])
        return found

    def load(self, index: int) -> BlockResult:
        """A finished block."""
        from safetensors import safe_open

        gains: dict[str, np.ndarray] = {}
        sites: dict[str, dict[str, np.ndarray]] = {}
        with safe_open(str(self._path(index)), "np") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                kind, _, rest = key.partition("/")
                if kind == "gain":
                    gains[rest] = file.get_tensor(key)
                else:
                    site, _, name = rest.partition("/")
                    sites.setdefault(site, {})[name] = file.get_tensor(key)
        return BlockResult(
            {site: QuantArrays.of(values) for site, values in sites.items()},
            gains,
            self.report(index),
        )
