"""ABQ-LLM's switches and what it declares; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.methods import Declaration
from calibration.methods.qqq.settings import AS_PUBLISHED, QqqSettings

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["DECLARATION", "SETTINGS", "AbqSettings"]

_EPOCHS, _MORE_EPOCHS = 20, 40  # of the published scripts


@dataclass(frozen=True)
class AbqSettings(QqqSettings):
    """Transforms and clips learned block by block, then the rounding of QQQ, then scales.

    Attributes:
        epochs: passes over the windows that train transforms, clips and compensation; 0 leaves them
            out.
        transforms: learn equivalent transforms (LET).
        compensation: learn a rank-1 term of down_proj in the first three and last four blocks.
        tune: passes that train weight scales and norm gains once the codes are final, in blocks
            with weights of 1 or 2 bits, where it pays; 0 leaves them.
        train_windows: calibration windows that training sees, at most.
        batch: windows per step, over all processes.
        alpha: start of the transforms, SmoothQuant's.
        transform_rate, clip_rate, compensation_rate, scale_rate, gain_rate: learning rates; 0 keeps
        a part at its start.
        loss_error, loss_direction, loss_attention: factors of the squared error, of the
            distribution correction and of the attention divergence.
    """

    refits: int = 1
    epochs: int = 0
    transforms: bool = True
    compensation: bool = True
    tune: int = 1
    train_windows: int = 16
    batch: int = 1
    alpha: float = 0.5
    transform_rate: float = 5e-3
    clip_rate: float = 1e-2
    compensation_rate: float = 1e-2
    scale_rate: float = 5e-3
    gain_rate: float = 5e-3
    loss_error: float = 1.0
    loss_direction: float = 1.0
    loss_attention: float = 1.0

    @classmethod
    def preset(cls, effort: str, scheme: QuantScheme) -> Mapping[str, Any]:
        """The paper trains and rounds to nearest, W2*, W1* and W8A8 for longer."""
        if effort == "fast":
            return {"tune": 0, "refits": 0}
        if effort != "paper":
            return {}
        longer = scheme.balanced or (scheme.wbits, scheme.abits) == (8, 8)
        return AS_PUBLISHED | {
            "gptq": False,
            "refits": 0,
            "epochs": _MORE_EPOCHS if longer else _EPOCHS,
            "tune": 0,
            "train_windows": 128,
        }


SETTINGS = AbqSettings
DECLARATION = Declaration(codes=("uint8",), counts_processes=True)
