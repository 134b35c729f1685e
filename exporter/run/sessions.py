"""One decoder, three ways to run it: torch reference, ONNX Runtime, TensorRT; each keeps its KV
cache between calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from plugins.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from calibration.quant.folder import QuantModel
    from calibration.reference.model import Computed, Reference

__all__ = ["KINDS", "DecoderSession", "OnnxSession", "TorchSession", "cache_names", "open_session"]

KINDS = ("torch", "onnxruntime", "tensorrt")
CHUNK = 512  # tokens per call into the runtime: bounds the logits and score matrices held at once


class DecoderSession(ABC):
    """Feeds tokens to a decoder, and builds attention mask and positions itself.

    Attributes:
        max_context: most tokens a sequence may have.
        max_tokens: most new tokens in one call into the runtime.
    """

    def __init__(self, max_context: int, max_tokens: int = CHUNK) -> None:
        self.max_context, self.max_tokens = max_context, max_tokens
        self._mask: np.ndarray | None = None  # of everything in the cache, [B, P]

    def __enter__(self) -> DecoderSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return 0 if self._mask is None else int(self._mask.shape[1])

    def reset(self) -> None:
        """Forget the cache: the next tokens start new sequences."""
        self._mask = None
        self._clear()

    def run(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        reset: bool = False,
        last_only: bool = False,
    ) -> np.ndarray:
        """Append tokens to the sequences.

        Args:
            input_ids: [B, S].
            attention_mask: of the new tokens [B, S] or of all [B, P+S]; 0 is (left) padding. None:
                all are real.
            reset: forget the cache first.
            last_only: return the last token's logits only, which bounds the memory.

        Returns:
            Logits [B, S, V] (or [B, 1, V]), fp32.

        Raises:
            InputError: shapes do not fit the cache, or the context would grow too long.
        """
        if reset:
            self.reset()
        ids = np.ascontiguousarray(input_ids, np.int64)
        mask = self._whole_mask(ids, attention_mask)
        past, tokens = self.length, ids.shape[1]
        pieces: list[np.ndarray] = []
        for start in range(0, tokens, self.max_tokens):
            end = min(start + self.max_tokens, tokens)
            logits = self.step(ids[:, start:end], mask[:, : past + end])["logits"]
            pieces = [logits[:, -1:]] if last_only else [*pieces, logits]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)

    def step(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """One call into the runtime: tokens [B, S] with the whole mask [B, P+S]; every output by
        its ONNX name.
        """
        past = attention_mask.shape[1] - input_ids.shape[1]
        positions = np.maximum(np.cumsum(attention_mask, 1) - 1, 0)[:, past:]
        outputs = self._forward(input_ids, attention_mask, np.ascontiguousarray(positions))
        self._mask = attention_mask
        return outputs

    def _whole_mask(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        fix = "Reset the session to start new sequences"
        if ids.ndim != 2 or not ids.size:
            raise InputError(
                "input_ids",
                f"got shape {list(ids.shape)}, expected [batch, tokens] with at least one token",
                fix,
            )
        batch, tokens = ids.shape
        old = np.ones((batch, 0), np.int64) if self._mask is None else self._mask
        if len(old) != batch:
            raise InputError(
                "input_ids", f"got a batch of {batch}, expected {len(old)} as in the cache", fix
            )
        total = old.shape[1] + tokens
        if total > self.max_context:
            raise InputError(
                "input_ids",
                f"got a context of {total} tokens, expected at most {self.max_context}",
                "Give less text, or reset the session",
            )
        new = (
            np.ones((batch, tokens), np.int64)
            if mask is None
            else np.ascontiguousarray(mask, np.int64)
        )
        if new.shape == (batch, tokens):
            return np.concatenate([old, new], 1)
        if new.shape != (batch, total):
            raise InputError(
                "attention_mask",
                f"got shape {list(new.shape)}, expected {[batch, tokens]} or {[batch, total]}",
                fix,
            )
        return new

    @abstractmethod
    def _forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Run the decoder and keep the cache."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget the cache."""

    @abstractmethod
    def close(self) -> None:
        """Free the runtime; the session cannot be used any more."""


def cache_names(layers: int) -> list[str]:
    """The cache tensors, "0.key", "0.value", "1.key" ..., to be prefixed with past_key_values. or
    present.
    """
    return [f"{index}.{kind}" for index in range(layers) for kind in ("key", "value")]


class TorchSession(DecoderSession):
    """A decoder in torch, float or fake-quantised.

    Args:
        reference: of calibration/reference/model.py.
        watch_layers: also return every decoder layer's output and the cache.
    """

    def __init__(self, reference: Reference, watch_layers: bool = False) -> None:
        super().__init__(reference.context)
        self.reference = reference
        self._watch = watch_layers
        self._clear()

    def _clear(self) -> None:
        self._cache: Any = None

    def _forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        import torch

        from exporter.graph.decoder import layer_output

        ids, mask, places = map(torch.from_numpy, (input_ids, attention_mask, positions))
        made = self._compute(ids, mask, places)
        self._cache = made.cache
        outputs: dict[str, np.ndarray] = {"logits": made.logits.numpy()}
        if self._watch:
            for index, (layer, (key, value)) in enumerate(
                zip(made.layers, made.cache, strict=True)
            ):
                outputs[layer_output(index)] = layer.numpy()
                outputs[f"present.{index}.key"] = key.numpy()
                outputs[f"present.{index}.value"] = value.numpy()
        return outputs

    def _compute(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Computed:
        return self.reference(ids, mask, positions, self._cache)

    def close(self) -> None:
        """Let go of the model."""
        self._clear()
        del self.reference


class OnnxSession(DecoderSession):
    """ONNX Runtime on the CPU, through Polygraphy.

    It runs the graph as round_every_op (onnx_runner.py) rewrites it, with explicit casts around
    standard ops, so that every 16-bit rounding happens where the file says; the custom nodes and
    all weights are the file's.

    Args:
        folder: OUT/onnx.
        config: the model's config, as in quant.json.
        marked: inner tensors that step() returns besides the model's outputs.
    """

    def __init__(self, folder: Path, config: dict[str, Any], marked: Sequence[str] = ()) -> None:
        from exporter.run.onnxruntime import onnx_runner

        super().__init__(int(config["max_position_embeddings"]))
        self._names = cache_names(config["num_hidden_layers"])
        self._runner = onnx_runner(folder, marked)
        self._runner.activate()
        meta = self._runner.get_input_metadata()["past_key_values.0.key"]
        self._cache_shape, self._dtype = (meta.shape[1], meta.shape[3]), meta.dtype
        self._clear()

    def _clear(self) -> None:
        self._cache: dict[str, np.ndarray] = {}

    def _forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        heads, width = self._cache_shape
        empty = np.zeros((len(input_ids), heads, 0, width), self._dtype)
        past = {f"past_key_values.{name}": self._cache.get(name, empty) for name in self._names}
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
            **past,
        }
        outputs: dict[str, np.ndarray] = self._runner.infer(feeds, check_inputs=False)
        self._cache = {name: outputs[f"present.{name}"] for name in self._names}
        return outputs

    def close(self) -> None:
        """Free the session."""
        if self._runner.is_active:
            self._runner.deactivate()


def open_session(kind: str, out: Path | str) -> DecoderSession:
    """A session on an artefact folder.

    Args:
        kind: "torch" (the fake-quantised reference), "onnxruntime" or "tensorrt".
        out: the artefact folder OUT.

    Raises:
        InputError: the kind is unknown, a stage is missing or damaged, or there is no CUDA device
            for "tensorrt".
    """
    if kind not in KINDS:
        raise InputError(
            "--runner", f"got {kind!r}, expected {', '.join(KINDS)}", "Choose one of these"
        )
    if kind == "tensorrt":
        from exporter.run.tensorrt import TensorrtSession, require_gpu

        require_gpu()
        return TensorrtSession(Path(out) / "engine", _read_quant(Path(out)).config)
    quant = _read_quant(Path(out))
    if kind == "onnxruntime":
        return OnnxSession(Path(out) / "onnx", quant.config)
    from calibration.reference.model import quantised_model

    return TorchSession(quantised_model(quant))


def _read_quant(out: Path) -> QuantModel:
    from calibration.quant.folder import read_quant
    from calibration.quant.quantize import STAGE

    return read_quant(out / STAGE)
