"""Runs the quantized model in torch: the reference, slow and exact, that every other runner is
compared with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calibration.out.folder import open_stage, stages_in
from calibration.out.layout import MANIFEST, ONNX, QUANT, QUANT_JSON
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
        """What quant.json says, for OUT/quant has no model.json; within the positions of OUT/onnx
        where that was made too, so that all runners take the same texts.
        """
        from calibration.quant.describe import describe
        from calibration.quant.folder import read_quant

        folder.file(QUANT_JSON)
        made, out = describe(read_quant(folder.path, verify=False)), folder.path.parent
        if not (out / MANIFEST).is_file() or ONNX not in stages_in(out):
            return made
        longest = open_stage(out, ONNX, "its max_context").description().max_context
        return replace(made, max_context=min(made.max_context, longest))

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads every weight."""
        from calibration.quant.folder import read_quant
        from calibration.reference.model import quantised_model

        folder.file(QUANT_JSON)
        quant = read_quant(folder.path, verify=False)
        for name in quant.files:
            folder.file(name)
        model = quantised_model(quant, max_context=description.max_context)
        return TorchSession(model, description.dtype, description.max_context)


class TorchSession(DecoderSession):
    """A decoder in torch, float or fake-quantised.

    Args:
        reference: of calibration/reference/model.py.
        dtype: of its floats.
        max_context: most tokens a sequence may have; None: as many as the model was made for.
    """

    def __init__(
        self, reference: Reference, dtype: str = "float32", max_context: int | None = None
    ) -> None:
        super().__init__(max_context or reference.context, dtype=dtype)
        self.reference = reference
        self._clear()

    def _clear(self) -> None:
        self._cache: Any = None

    def _forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> dict[str, np.ndarray]:
        import torch

        ids, mask, places, rows = map(
            torch.from_numpy, (input_ids, attention_mask, positions, wanted)
        )
        made = self._compute(ids, mask, places)
        self._cache = made.cache
        logits = made.logits.take_along_dim(rows[..., None], 1)
        outputs: dict[str, np.ndarray] = {"logits": logits.numpy()}
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
