"""Runs the quantized model in torch: the reference, slow and exact, that every other runner is
compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.out.layout import QUANT, QUANT_JSON
from exporter.graph.names import KINDS, layer_output, present
from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder
    from calibration.reference.model import Computed, Reference

__all__ = ["RUNNER", "TorchSession"]


class ReferenceRunner(Runner):
    """Weights and activations are rounded as the kernels do, and multiplied as floats."""

    name = "torch"
    stage = QUANT
    help = "the dequantized reference with the same activation quantization"

    def describe(self, folder: StageFolder) -> Description:
        """What quant.json says: OUT/quant has no model.json."""
        from calibration.quant.describe import describe
        from calibration.quant.folder import read_quant

        folder.file(QUANT_JSON)
        return describe(read_quant(folder.path, verify=False))

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads every weight."""
        from calibration.quant.folder import read_quant
        from calibration.reference.model import quantised_model

        folder.file(QUANT_JSON)
        quant = read_quant(folder.path, verify=False)
        for name in quant.files:
            folder.file(name)
        return TorchSession(quantised_model(quant), description.dtype)


class TorchSession(DecoderSession):
    """A decoder in torch, float or fake-quantised.

    Args:
        reference: of calibration/reference/model.py.
        dtype: of its floats.
    """

    def __init__(self, reference: Reference, dtype: str = "float32") -> None:
        super().__init__(reference.context, dtype=dtype)
        self.reference = reference
        self._clear()

    def _clear(self) -> None:
        self._cache: Any = None

    def _forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        import torch

        ids, mask, places = map(torch.from_numpy, (input_ids, attention_mask, positions))
        made = self._compute(ids, mask, places)
        self._cache = made.cache
        outputs: dict[str, np.ndarray] = {"logits": made.logits.numpy()}
        for index, (layer, cache) in enumerate(zip(made.layers, made.cache, strict=True)):
            for kind, part in zip(KINDS, cache, strict=True):
                outputs[present(index, kind)] = part.numpy()
            outputs[layer_output(index)] = layer.numpy()
        return outputs

    def _compute(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Computed:
        return self.reference(ids, mask, positions, self._cache)

    def close(self) -> None:
        """Let go of the model."""
        self._clear()
        del self.reference


RUNNER = ReferenceRunner()
