"""Picks the next token from logits: the best one, or a draw from the best K at a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy, 1 draws from the model's own distribution.
        top_k: draw among the K best only; 0 is all.
        seed: the same seed draws the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k and not self.temperature:
            raise InputError(
                "--top-k",
                f"got {self.top_k} with temperature 0, expected none: 0 always takes the best token",
                "Add --temperature 0.8, or leave --top-k out",
            )


class Sampler:
    """Draws one token after the other."""

    def __init__(self, sampling: Sampling) -> None:
        import numpy as np

        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """The next token.

        Args:
            logits: [vocab].

        Raises:
            CheckError: there is a NaN among them.
        """
        import numpy as np

        if np.isnan(logits).any():
            raise CheckError(
                "logits",
                f"got {int(np.isnan(logits).sum())} NaN of {logits.size}, expected finite numbers",
                "An activation overflowed: look at the report's first bad layer, or export with "
                "--dtype bfloat16",
            )
        if not self._sampling.temperature:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self._sampling.top_k or None]
        scores = logits[order].astype(np.float64)
        weights = np.exp((scores - scores[0]) / self._sampling.temperature)
        return int(self._random.choice(order, p=weights / weights.sum()))
