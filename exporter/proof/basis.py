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

__all__ = ["RotatedRunner", "recorded_rotation"]


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


class RotatedRunner(SessionRunner):
    """A session of the float model; decoder layers' outputs [B, S, hidden] become x Q and cached
    values [B, heads, S, d] v R.

    Args:
        name, make: see SessionRunner.
        rotation: of the quantised model, or None for outputs as they are.
    """

    def __init__(
        self, name: str, make: Callable[[], DecoderSession], rotation: Rotation | None
    ) -> None:
        super().__init__(name, make)
        matrices = {} if rotation is None else {"value": rotation.head}
        if rotation is not None and rotation.residual is not None:
            matrices["output"] = rotation.residual
        patterns = {"output": r"model\.layers\.\d+\.output", "value": r"present\.\d+\.value"}
        self._matrices = [
            (re.compile(patterns[kind]), matrix.numpy()) for kind, matrix in matrices.items()
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
