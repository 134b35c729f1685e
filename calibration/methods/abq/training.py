"""What the training of a block can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from calibration.methods.abq.losses import LossWeights
from calibration.methods.abq.transforms import TransformParts

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """How a block is trained; the defaults are ABQ-LLM's.

    Attributes:
        epochs: passes over the windows.
        batch: windows per step, over all processes.
        transform_rate, clip_rate, compensation_rate: learning rates of scales, clips and the rank-1
            term; 0 keeps one at its start.
        parts: scales to learn; None leaves the float weights as they are.
        alpha: exponent of the scales' start.
        powers: of the start; with more than one, each site takes the one with the least loss before
            training.
        loss: factors of the loss terms.
        both_streams: compare also with the float block on the quantised stream.
        rows: attention rows per window in the attention term.
        scale_rate, gain_rate: learning rates of tune_block, relative: of logarithms of weight
            scales, and of norm gains.
    """

    epochs: int = 20
    batch: int = 1
    transform_rate: float = 5e-3
    clip_rate: float = 1e-2
    compensation_rate: float = 1e-2
    parts: TransformParts | None = field(default_factory=TransformParts)
    alpha: float = 0.5
    powers: tuple[float, ...] = (1.0, 0.5, 0.0)
    loss: LossWeights = field(default_factory=LossWeights)
    both_streams: bool = True
    rows: int = 64
    scale_rate: float = 1e-3
    gain_rate: float = 1e-3
