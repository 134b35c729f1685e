"""QQQ's switches; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.blocks.settings import WalkSettings

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["AS_PUBLISHED", "SETTINGS", "QqqSettings"]

AS_PUBLISHED = {"rotation": "none", "clip_steps": 1, "correct": 0.0}  # what both papers do without


@dataclass(frozen=True)
class QqqSettings(WalkSettings):
    """GPTQ after smoothing or rotation.

    Attributes:
        gptq: round with GPTQ; off rounds to nearest.
        damp: part of the Hessian's mean diagonal that is added to it.
        act_order: GPTQ takes columns in descending order of their activations.
        refits: how often scales are fitted to GPTQ's codes and the codes made again; where that is
            no better, the first stay.
    """

    gptq: bool = True
    damp: float = 0.01
    act_order: bool = True
    refits: int = 0

    @classmethod
    def preset(cls, effort: str, scheme: QuantScheme) -> Mapping[str, Any]:
        """The paper smooths every site."""
        return AS_PUBLISHED | {"smooth": "all"} if effort == "paper" else {}


SETTINGS = QqqSettings
