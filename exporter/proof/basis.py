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
    from torch import Tensor

    from calibration.quant.folder import QuantModel
    from calibration.transforms.rotation import Rotation
    from exporter.run.sessions import DecoderSession

__all__ = ["RotatedRunner", "basis_name", "recorded_rotation", "turned"]

_NONE = "none"  # a rotation's kind where there is none


def recorded_rotation(quant: QuantModel) -> Rotation | None:
    """The rotation that calibration folded into the weights, made again from its recorded kind and
    seed; None if it rotated nothing.
    """
    from calibration.transforms.rotation import Rotation

    kind, seed = _recorded(quant)
    if kind == _NONE:
        return None
    head_dim = quant.decoder.blocks[0].heads.head_dim
    return Rotation.make(kind, quant.decoder.hidden, head_dim, seed)


def basis_name(quant: QuantModel) -> str:
    """What the weights' coordinates are called; two artifacts of one float model have the same if these
    are the same.
    """
    kind, seed = _recorded(quant)
    return "not rotated" if kind == _NONE else f"rotated ({kind}, seed {seed})"


def _recorded(quant: QuantModel) -> tuple[str, int]:
    """Kind and seed."""
    settings = quant.calibration.get("settings", {})
    told = settings.get("switches", {}).get("rotation", _NONE)
    kind = quant.calibration.get("rotation", told)  # of a method that rotates without a switch
    return str(kind), int(settings.get("seed", 0))


def turned(quant: QuantModel, other: QuantModel) -> Rotation | None:
    """What brings the outputs of `other` into the coordinates of `quant`, both of one float model;
    None if they are the same.
    """
    import torch

    from calibration.transforms.rotation import Rotation

    mine, theirs = recorded_rotation(quant), recorded_rotation(other)
    residual = _between(mine and mine.residual, theirs and theirs.residual)
    head = _between(mine and mine.head, theirs and theirs.head)
    if residual is None and head is None:
        return None
    if head is None:
        head = torch.eye(quant.decoder.blocks[0].heads.head_dim, dtype=torch.float64)
    return Rotation(residual, head)


def _between(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """The matrix that takes x theirs to x mine, both orthogonal; None stands for the identity."""
    if theirs is None:
        return mine
    if mine is None:
        return theirs.T
    return None if mine.equal(theirs) else theirs.T @ mine


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
