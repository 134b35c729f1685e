"""Residual streams on the disk, behind the last finished block: what spares a calibration that goes on
from walking its finished blocks again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calibration.blocks.ranks import Ranks
from calibration.out.files import discard, temporary

if TYPE_CHECKING:
    from calibration.blocks.streams import Windows
    from calibration.out.pieces import Pieces

__all__ = ["SavedStreams"]

_CHUNK = 1 << 22


class SavedStreams:
    """The streams of this process's windows in a file that ends with the SHA-256 of what is before it,
    behind the store's fingerprint.

    Nobody waits for the disk: a file that a lost machine left incomplete counts as missing, and then
    blocks are walked again.

    Args:
        pieces: with the blocks; streams of another fingerprint count as missing.
        ranks: the processes that share the windows. Another number of them has other streams, and
            removes those that are there.
        warn: told once where the disk takes no streams.
    """

    def __init__(self, pieces: Pieces, ranks: Ranks, warn: Callable[[str], None]) -> None:
        self._folder, self._fingerprint, self._ranks = pieces.folder, pieces.fingerprint, ranks
        self._warn, self._refused = warn, False
        for path in self._folder.glob("streams-*.bin"):
            if not path.stem.endswith(f"-of-{ranks.world}"):
                discard(path)  # unless another process was first

    def _digest(self) -> hashlib._Hash:
        return hashlib.sha256(self._fingerprint.encode())

    def _path(self, blocks: int) -> Path:
        rank = f"{self._ranks.rank}-of-{self._ranks.world}"
        return self._folder / f"streams-{blocks:05d}-{rank}.bin"

    def save(self, blocks: int, streams: Sequence[Windows]) -> None:
        """Put the streams behind so many blocks on the disk, in the place of those before. A disk that
        does not take them is not asked again.
        """
        if self._refused:
            return
        path, digest = self._path(blocks), self._digest()
        unfinished = temporary(path)
        try:
            self._folder.mkdir(
                parents=True, exist_ok=True
            )  # on another machine than the first one's
            with unfinished.open("xb") as file:
                for windows in streams:
                    for window in windows:
                        data = memoryview(window.cpu().contiguous().numpy()).cast("B")
                        digest.update(data)
                        file.write(data)
                file.write(digest.digest())
            unfinished.replace(path)
            for other in self._folder.glob(self._path(0).name.replace("00000", "*")):
                if other != path:
                    other.unlink()
        except OSError as error:
            self._refused = True
            self._warn(
                f"{path}: got {error.strerror or error} while writing. The calibration goes on; should it be "
                "interrupted, --resume walks finished blocks again, which takes longer."
            )
        finally:
            discard(unfinished)

    def behind(self, most: int) -> int:
        """The largest number of blocks, at most `most`, behind which every process has its streams; 0
        where there is none.
        """
        have = torch.zeros(most + 1)
        for blocks in range(1, most + 1):
            have[blocks] = self._whole(self._path(blocks))
        self._ranks.sum([have])
        common = (have == self._ranks.world).nonzero()
        return int(common.max()) if len(common) else 0

    def _whole(self, path: Path) -> bool:
        digest = self._digest()
        try:
            left = path.stat().st_size - digest.digest_size
            with path.open("rb") as file:
                while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                    digest.update(chunk)
                    left -= len(chunk)
                return file.read() == digest.digest()
        except OSError:
            return False

    def load(self, blocks: int, streams: Sequence[Windows]) -> None:
        """Fill the streams with those behind so many blocks, which behind() has found."""
        with self._path(blocks).open("rb") as file:
            for windows in streams:
                for index in range(len(windows)):
                    data = torch.frombuffer(
                        bytearray(file.read(windows.item_bytes)), dtype=torch.float32
                    )
                    windows[index] = data.reshape(windows.shape[1:])
