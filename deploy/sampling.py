"""Picks the next token from logits: the best one, or a draw from the likeliest at a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.out.description import LEAST_PENALTY, MOST_PENALTY, MOST_TEMPERATURE
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.out.description import SamplingDefaults

__all__ = ["Sampler", "Sampling", "SamplingOptions"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as transformers' generate means it.

    Attributes:
        temperature: 0 is greedy, 1 draws from the model's own distribution; at most 100.
        top_k: draw among the K best only; 0 is all.
        seed: the same seed draws the same tokens.
        top_p: draw among the fewest tokens whose odds sum up to this; 1 is all.
        repetition_penalty: of tokens that the text has already, 0.01 to 100; 1 is none.

    Raises:
        InputError: a number is out of range, or top_k or top_p limits a draw that is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise InputError(
                "--temperature",
                f"got {self.temperature:g}, expected 0 to {MOST_TEMPERATURE:g}",
                "Give such a number; 0 takes the best token, 1 the model's own odds",
            )
        if not 0 < self.top_p <= 1:
            raise InputError(
                "--top-p",
                f"got {self.top_p:g}, expected more than 0 and at most 1",
                "Give such a number; 1 draws among all tokens",
            )
        if not LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise InputError(
                "--repetition-penalty",
                f"got {self.repetition_penalty:g}, expected {LEAST_PENALTY:g} to {MOST_PENALTY:g}",
                "Give such a number; 1 changes nothing",
            )
        for option, value, all_of_them in (
            ("--top-k", self.top_k, 0),
            ("--top-p", self.top_p, 1),
        ):
            if value != all_of_them and not self.temperature:
                raise InputError(
                    option,
                    f"got {value:g} with temperature 0, expected none: 0 always takes the best "
                    f"token",
                    f"Add --temperature 0.8, or leave {option} out",
                )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What the user says about it; None leaves it to the model."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def over(self, model: SamplingDefaults) -> Sampling:
        """The model's own way with these changes. Raises as Sampling does."""
        own = model.temperature if model.do_sample else 0.0
        temperature = own if self.temperature is None else self.temperature
        penalty = self.repetition_penalty
        return Sampling(
            temperature,
            top_k=(model.top_k if temperature else 0) if self.top_k is None else self.top_k,
            seed=self.seed,
            top_p=(model.top_p if temperature else 1.0) if self.top_p is None else self.top_p,
            repetition_penalty=model.repetition_penalty if penalty is None else penalty,
        )


class Sampler:
    """Draws one token after the other."""

    def __init__(self, sampling: Sampling) -> None:
        import numpy as np

        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray, text: Sequence[int] = ()) -> int:
        """The next token.

        Args:
            logits: [vocab], finite.
            text: the tokens so far, the prompt's too.
        """
        scores = self.penalized(logits, text)
        if not self._sampling.temperature:
            return int(scores.argmax())
        tokens, odds = self.odds(scores)
        return int(self._random.choice(tokens, p=odds))

    def penalized(self, logits: np.ndarray, text: Sequence[int]) -> np.ndarray:
        """The logits, [vocab] fp64, those of tokens that the text has already made less likely."""
        import numpy as np

        scores, penalty = logits.astype(np.float64), self._sampling.repetition_penalty
        if penalty != 1 and len(text):
            seen = np.unique(text)
            found = scores[seen]
            scores[seen] = np.where(found < 0, found * penalty, found / penalty)
        return scores

    def odds(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be drawn, the likeliest first, and how likely each is.

        Args:
            scores: [vocab] fp64, penalized.
        """
        import numpy as np

        tokens = np.argsort(-scores, kind="stable")[: self._sampling.top_k or None]
        best = scores[tokens]
        with np.errstate(over="ignore", under="ignore"):  # at a tiny temperature: no odds at all
            odds = np.exp((best - best[0]) / self._sampling.temperature)
        odds /= odds.sum()
        if self._sampling.top_p < 1:
            # What is left after a token, itself included, is cut where it is unlikely enough.
            rest = odds[::-1].cumsum()[::-1]
            count = max(int((rest > 1 - self._sampling.top_p).sum()), 1)
            tokens, odds = tokens[:count], odds[:count] / odds[:count].sum()
        return tokens, odds
