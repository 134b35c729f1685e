"""Exports made on the spot, and a session of stock ONNX Runtime on the file as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.out.files import StageWriter
from calibration.quant.bits import SchemeMap
from calibration.quant.folder import read_quant
from calibration.quant.quantize import QuantizeOptions, quantize_model
from calibration.quant.scheme import QuantScheme
from exporter.graph.decoder import MODEL_FILE, export_onnx


def export(model: Path, scheme: QuantScheme | SchemeMap, out: Path) -> Path:
    """Quantise and export; returns the onnx folder."""
    with StageWriter(out, "quant") as writer:
        quantize_model(
            open_checkpoint(str(model), offline=True), scheme, QuantizeOptions(), writer.path
        )
    folder = out / "onnx"
    folder.mkdir()
    export_onnx(read_quant(out / "quant"), folder)
    return folder


def feeds(
    ids: np.ndarray,
    past: dict[str, np.ndarray],
    mask: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Inputs for new tokens after a cache; logits of all of them, or of those at `wanted` [B, L]."""
    length = next(iter(past.values())).shape[2]
    if mask is None:
        mask = np.ones((len(ids), length + ids.shape[1]), np.int64)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, length:]
    if wanted is None:
        wanted = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "logits_indices": wanted,
        **past,
    }


class Decoder:
    """ONNX Runtime on an export."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(folder / MODEL_FILE))
        self.caches = [
            value for value in self.session.get_inputs() if value.name.startswith("past")
        ]

    def empty(self, batch: int = 1) -> dict[str, np.ndarray]:
        dtype = {
            "tensor(float)": np.float32,
            "tensor(float16)": np.float16,
            "tensor(int8)": np.int8,
        }
        return {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype[value.type])
            for value in self.caches
        }

    def __call__(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logits, *present = self.session.run(None, inputs)
        return logits, {
            value.name: array for value, array in zip(self.caches, present, strict=True)
        }
