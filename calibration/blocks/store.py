"""Durable results of finished blocks: what a killed calibration goes on from."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from calibration.out.files import remove, sha256_file, temporary, write_json
from calibration.out.json_file import read_record
from plugins.core.op_spec import QuantArrays
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BlockResult", "BlockStore"]

_STATE = "state.json"


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


class _State(TypedDict):
    """What the results depend on, and the checksum of each."""

    fingerprint: str
    sha256: list[str]


class BlockStore:
    """A folder with one file per finished block, each written whole or not at all, and the files'
    checksums.

    Args:
        folder: made if need be.
        fingerprint: of everything the results depend on; results of another one are thrown away.
        keep: go on from the results that are there; else they are thrown away too.
        writes: whether this process may change the folder.
    """

    def __init__(
        self, folder: Path, fingerprint: str, keep: bool = True, writes: bool = True
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        if not writes:
            return
        linked = folder.is_symlink()  # it is not written through
        fresh = linked or not keep or self._state()["fingerprint"] != fingerprint
        try:
            if fresh:
                remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".*.tmp"):  # of a process that was killed
                path.unlink()
        except OSError as error:
            raise InputError(
                str(folder),
                f"got {error.strerror}, expected a folder that can be written",
                "Choose another --out",
            ) from error
        if fresh:
            write_json(folder / _STATE, {"fingerprint": fingerprint, "sha256": []})

    def _state(self) -> _State:
        try:
            return read_record(self.folder / _STATE, _State)
        except InputError:
            return {"fingerprint": "", "sha256": []}

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def finished(self) -> int:
        """Blocks that are there from the first one on, as they were written: a damaged one counts
        as missing.
        """
        count = 0
        for wanted in self._state()["sha256"]:
            path = self._path(count)
            if not path.is_file() or sha256_file(path) != wanted:
                break
            count += 1
        return count

    def save(self, index: int, result: BlockResult) -> None:
        """Put a block on the disk; those after it, if there are any, no longer count.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        import json

        from safetensors.numpy import save_file

        tensors = {f"gain/{name}": array for name, array in result.gains.items()}
        for site, arrays in result.sites.items():
            tensors |= {f"site/{site}/{name}": array for name, array in arrays.named().items()}
        unfinished = temporary(self._path(index))
        try:
            save_file(tensors, str(unfinished), {"report": json.dumps(result.report)})
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            digest = sha256_file(unfinished)
            unfinished.replace(self._path(index))
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise InputError(
                str(self._path(index)),
                f"got {error} while writing, expected a writable folder with enough space",
                "Check the disk; finished blocks are whole, go on with --resume",
            ) from error
        state = self._state()
        write_json(self.folder / _STATE, {**state, "sha256": [*state["sha256"][:index], digest]})

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

    def remove(self) -> None:
        """When everything is in the quant folder."""
        with suppress(OSError):
            remove(self.folder)
