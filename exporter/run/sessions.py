"""A decoder that runs: it keeps its KV cache between calls, whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from exporter.run.finite import check_finite
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CHUNK", "DecoderSession", "cache_names"]

_RESET = "Reset the session to start new sequences"
CHUNK = 512  # tokens per call into the runtime: bounds the logits and score matrices held at once


class DecoderSession(ABC):
    """Feeds tokens to a decoder, and builds attention mask and positions itself.

    Attributes:
        max_context: most tokens a sequence may have.
        max_tokens: most new tokens in one call into the runtime.
        max_logits: most of them whose logits one call gives; of more, step() makes several calls.
        dtype: of the model's floats.
    """

    def __init__(self, max_context: int, max_tokens: int = CHUNK, dtype: str = "float32") -> None:
        self.max_context, self.max_tokens, self.dtype = max_context, max_tokens, dtype
        self.max_logits = max_tokens
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
            last_only: compute the last token's logits only, which saves time and memory.

        Returns:
            Logits [B, S, V] (or [B, 1, V]), fp32.

        Raises:
            InputError: shapes do not fit the cache, or the context would grow too long.
            CheckError: the logits are no numbers.
        """
        import numpy as np

        if reset:
            self.reset()
        ids = np.ascontiguousarray(input_ids, np.int64)
        mask = self._whole_mask(ids, attention_mask)
        past, tokens = self.length, ids.shape[1]
        pieces: list[np.ndarray] = []
        most = self.max_tokens if last_only else min(self.max_tokens, self.max_logits)
        for start in range(0, tokens, most):
            end = min(start + most, tokens)
            # Padding goes to the left, so the last token of every sequence is the last of the piece.
            last = np.full((len(ids), 1), end - start - 1) if last_only else None
            outputs = self.step(ids[:, start:end], mask[:, : past + end], last)
            check_finite(outputs, self.dtype)
            pieces = [] if last_only else pieces
            pieces.append(outputs["logits"])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        logits_indices: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """One call into the runtime.

        Args:
            input_ids: tokens [B, S].
            attention_mask: of all, [B, P+S].
            logits_indices: which of the tokens' logits are wanted, [B, L] of 0..S-1; None: all of
                them.

        Returns:
            Every output by its ONNX name; "logits" are [B, L, V].

        Raises:
            InputError: an index is none of 0..S-1, or the shape is another; the cache is of another
                batch.
        """
        import numpy as np

        self._check_batch(len(input_ids))
        wanted = _places(logits_indices, *input_ids.shape)
        past = attention_mask.shape[1] - input_ids.shape[1]
        positions = np.maximum(np.cumsum(attention_mask, 1) - 1, 0)[:, past:]
        outputs = self._forward(input_ids, attention_mask, np.ascontiguousarray(positions), wanted)
        self._mask = attention_mask
        return outputs

    def _check_batch(self, batch: int) -> None:
        if self._mask is not None and len(self._mask) != batch:
            raise InputError(
                "input_ids",
                f"got a batch of {batch}, expected {len(self._mask)} as in the cache",
                _RESET,
            )

    def _whole_mask(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        import numpy as np

        if ids.ndim != 2 or not ids.size:
            raise InputError(
                "input_ids",
                f"got shape {list(ids.shape)}, expected [batch, tokens] with at least one token",
                _RESET,
            )
        batch, tokens = ids.shape
        self._check_batch(batch)
        old = np.ones((batch, 0), np.int64) if self._mask is None else self._mask
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
                _RESET,
            )
        return new

    @abstractmethod
    def _forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Run the decoder and keep the cache; arguments as of step(), with the tokens' positions
        [B, S] in their sequences, and `wanted` [B, L] in range.
        """

    @abstractmethod
    def _clear(self) -> None:
        """Forget the cache."""

    @abstractmethod
    def close(self) -> None:
        """Free the runtime; the session cannot be used any more."""


def _places(indices: np.ndarray | None, batch: int, tokens: int) -> np.ndarray:
    """Indices of wanted tokens as a runtime takes them, int64 [B, L]; it would read beyond its
    memory, or give zeros, where one is out of range.
    """
    import numpy as np

    if indices is None:
        return np.tile(np.arange(tokens), (batch, 1))
    places = np.ascontiguousarray(indices, np.int64)
    if places.ndim != 2 or len(places) != batch or not places.size:
        raise InputError(
            "logits_indices",
            f"got shape {list(places.shape)}, expected [{batch}, wanted] with at least one index",
            "Give as many indices for every sequence of the batch",
        )
    wrong = places[(places < 0) | (places >= tokens)]
    if wrong.size:
        raise InputError(
            "logits_indices",
            f"got index {wrong[0]}, expected 0 to {tokens - 1}, the new tokens",
            "Count from the first new token of the call, padding included",
        )
    return places


def cache_names(inputs: Iterable[str]) -> list[str]:
    """The cache tensors of a model with these inputs, "0.key", "0.value", "1.key" ..., to be
    prefixed with past_key_values. or present.
    """
    prefix = "past_key_values."
    return [name.removeprefix(prefix) for name in inputs if name.startswith(prefix)]
