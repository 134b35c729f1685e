"""The switches that come with the walk, whatever rounds the weights; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from calibration.settings import MethodSettings

__all__ = ["WalkSettings"]


@dataclass(frozen=True)
class WalkSettings(MethodSettings):
    """What happens to the weights of a site before they are rounded.

    Attributes:
        rotation: of the residual stream and the value heads: hadamard, orthogonal or none; of the
            value heads alone: values.
        smooth: adaptive smoothing at "all" four sites, at "down" only, or "none".
        clip_steps: clip ratios tried in the search for scales; 1 takes min and max.
        correct: 0 to 1, how far weights make up for what earlier layers and activation codes got
            wrong.
    """

    rotation: str = field(
        default="hadamard", metadata={"choices": ("hadamard", "orthogonal", "values", "none")}
    )
    smooth: str = field(default="none", metadata={"choices": ("none", "all", "down")})
    clip_steps: int = 40
    correct: float = 1.0
