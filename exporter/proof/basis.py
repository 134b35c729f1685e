"""The float model's outputs in the coordinates of the quantised one: a rotation is no error of
quantisation.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from exporter.proof.runners import Feed, SessionRunner

if TYPE_CHECKING:
    from calibration.quant.folder import QuantModel
    from calibration.transforms.rotation import Rotation
    from exporter.run.sessions import DecoderSession

__all__ = ["RotatedRunner", "recorded_rotation", "turned"]


def recorded_rotation(quant: QuantModel) -> Rotation | None:
    """The rotation that calibration folded into the weights, made again from its recorded kind and
    seed; None if it rotated nothing.
    """
    from calibration.transforms.rotation import Rotation

    settings = quant.calibration.get("settings", {})
    told = settings.get("switches", {}).get("rotation", "none")
    kind = quant.calibration.get("rotation", told)  # of a method that rotates without a switch
    if kind == "none":
        return None
    head_dim = quant.decoder.blocks[0].heads.head_dim
    return Rotation.make(kind, quant.decoder.hidden, head_dim, int(settings["seed"]))


def turned(quant: QuantModel, other: QuantModel) -> Rotation | None:
    """What brings the outputs of `other` into the coordinates of `quant`, both of one float model;
    None if they are the same.
    """
    from calibration.transforms.rotation import Rotation

    mine, theirs = recorded_rotation(quant), recorded_rotation(other)
    if theirs is None:
        return mine
    if mine is None:
        return Rotation(theirs.residual.T, theirs.head.T)
    if mine.residual.equal(theirs.residual):
        return None
    return Rotation(theirs.residual.T @ mine.residual, theirs.head.T @ mine.head)


class RotatedRunner(SessionRunner):
    """A session in other coordinates; decoder layers' outputs [B, S, hidden] become x Q and cached
    values [B, heads, S, d] v R.

    Args:
        name, make: see SessionRunner.
        rotation: of the model it is compared with, or None for outputs as they are.
    """

    def __init__(
        self, name: str, make: Callable[[], DecoderSession], rotation: Rotation | None
    ) -> None:
        super().__init__(name, make)
        self._matrices: list[tuple[re.Pattern[str], np.ndarray]] = []
        if rotation is not None:
            self._matrices = [
                (re.compile(r"model\.layers\.\d+\.output"), rotation.residual.numpy()),
                (re.compile(r"present\.\d+\.value"), rotation.head.numpy()),
            ]

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """Run one call and turn its outputs."""
        outputs = super().infer_impl(feed_dict)
        for name, array in outputs.items():
            for pattern, matrix in self._matrices:
                if pattern.fullmatch(name):
                    outputs[name] = (array.astype(np.float64) @ matrix).astype(array.dtype)
        self.outputs = outputs
        return outputs
