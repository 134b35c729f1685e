"""How to make a quant folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration import formats
from calibration.blocks.ranks import ALONE, Ranks
from calibration.settings import CalibrationSettings

__all__ = ["QuantizeOptions"]

SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class QuantizeOptions:
    """What the folder depends on besides the model and the schemes, and how it is written.

    Attributes:
        offline: never touch the network.
        settings: of the calibration.
        work: where finished blocks and weight files are kept, for the caller to remove when the folder
            is in its place; None: beside it, under the name layout.WORK, until it is written.
        resume: go on from what is there already.
        shard_bytes: largest weight file.
        format: one of calibration.formats, written into the quant folder too.
        ranks: the processes that share the work; the first one writes and needs the folder.
    """

    offline: bool = False
    settings: CalibrationSettings = CalibrationSettings()  # noqa: RUF009  (frozen)
    work: Path | None = None
    resume: bool = False
    shard_bytes: int = SHARD_BYTES
    format: str = formats.OURS
    ranks: Ranks = ALONE
