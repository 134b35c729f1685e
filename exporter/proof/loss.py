"""How much worse, or better, the session that users run predicts a text than the graph with every
rounding in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import ONNX
from calibration.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from exporter.run.sessions import DecoderSession

__all__ = ["LossDifference", "loss_as_run", "loss_difference"]

_SIGMAS = 1.96  # of a normal distribution, 95 % of which lies within
_MOST = 0.02  # nats: 2 % of perplexity


@dataclass(frozen=True)
class LossDifference:
    """Of a session from another on the same predictions.

    Attributes:
        predictions: how many.
        loss: the other's mean of -log p(token), in nats.
        difference: how much the session's is larger, in nats.
        interval: half the width of the 95 % confidence interval of that.
    """

    predictions: int
    loss: float
    difference: float
    interval: float

    @property
    def shows(self) -> bool:
        """Whether the difference is more than chance."""
        return abs(self.difference) > self.interval

    @property
    def failure(self) -> str:
        """What is wrong where the whole interval lies beyond the limit; else ""."""
        if abs(self.difference) - self.interval <= _MOST:
            return ""
        return (
            f"got a loss of {self} by the ONNX file as users run it, expected at most {_MOST:g} nats "
            "more or less than the rounded graph's"
        )

    def __str__(self) -> str:
        return (
            f"{self.difference:+.4f} nats (95 % interval {self.difference - self.interval:+.4f} to "
            f"{self.difference + self.interval:+.4f}, {self.predictions} predictions)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def loss_difference(other: np.ndarray, session: np.ndarray) -> LossDifference:
    """Of losses of the same predictions, in nats."""
    apart = session - other
    spread = float(apart.std(ddof=1)) / math.sqrt(len(apart))
    return LossDifference(len(apart), float(other.mean()), float(apart.mean()), _SIGMAS * spread)


def loss_as_run(
    out: Path, dtype: str, context: int, windows: np.ndarray, progress: Progress
) -> LossDifference:
    """The file as users run it against the graph with every rounding in its place, the nodes of both
    by native kernels.

    Args:
        out: the artifact folder.
        dtype: of the model's floats.
        context: most tokens of a sequence.
        windows: tokens int64 [n, L], each scored alone.
        progress: advanced twice a window.

    Raises:
        CheckError: the logits are no numbers.
    """
    from exporter.run.native import NativeSession, native_library
    from exporter.run.onnxruntime import OnnxSession

    library = native_library()
    assert isinstance(library, Path)
    rounded = _losses(
        lambda: OnnxSession(out / ONNX, context, dtype=dtype, kernels=library), windows, progress
    )
    users = _losses(lambda: NativeSession(out / ONNX, context, dtype), windows, progress)
    return loss_difference(rounded, users)


def _losses(
    make: Callable[[], DecoderSession], windows: np.ndarray, progress: Progress
) -> np.ndarray:
    import numpy as np

    from exporter.proof.perplexity import window_losses

    found = []
    with make() as session:
        for window in windows:
            found.append(window_losses(session, window))
            progress.advance(note="loss")
    return np.concatenate(found)
