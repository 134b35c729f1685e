"""Runs the quantized model in torch: the reference, slow and exact, that every other runner is compared
with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.out.layout import QUANT, QUANT_JSON
from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession

if TYPE_CHECKING:
    import numpy as np

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder

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
        return TorchSession(quantised_model(quant))


class TorchSession(DecoderSession):
    """A transformers model, float or fake-quantised.

    Args:
        model: LlamaForCausalLM in eval mode.
        watch_layers: also return every decoder layer's output and the cache.
    """

    def __init__(self, model: Any, watch_layers: bool = False) -> None:
        super().__init__(int(model.config.max_position_embeddings))
        self.model = model
        self._watch = watch_layers
        self._clear()

    def _clear(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def _forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        import torch

        outputs: dict[str, np.ndarray] = {}
        hooks = [
            layer.register_forward_hook(_keep(outputs, index))
            for index, layer in enumerate(self.model.model.layers)
            if self._watch
        ]
        try:
            with torch.no_grad():
                result = self.model(
                    torch.from_numpy(input_ids),
                    attention_mask=torch.from_numpy(attention_mask),
                    position_ids=torch.from_numpy(positions),
                    past_key_values=self.cache,
                    use_cache=True,
                )
        finally:
            for hook in hooks:
                hook.remove()
        outputs["logits"] = result.logits.float().numpy()
        if self._watch:
            for index, layer in enumerate(self.cache.layers):
                outputs[f"present.{index}.key"], outputs[f"present.{index}.value"] = (
                    layer.keys.numpy(),
                    layer.values.numpy(),
                )
        return outputs

    def close(self) -> None:
        """Let go of the model."""
        self._clear()
        self.model = None


def _keep(outputs: dict[str, np.ndarray], index: int) -> Any:
    from exporter.graph.decoder import layer_output

    def hook(module: Any, arguments: Any, output: Any) -> None:
        outputs[layer_output(index)] = output.numpy().copy()

    return hook


RUNNER = ReferenceRunner()
