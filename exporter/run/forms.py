"""What a graph is fed besides its cache, by the form of that: one that grows, or one of fixed capacity
whose rows are written in place. Sessions speak of masks and left padding whichever it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.graph.names import WRITE_INDICES, is_cache, is_routed

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["CacheForm", "Growing", "Static", "cache_bits", "cache_form", "with_numbers"]

Arrays = dict[str, "np.ndarray"]


class CacheForm(ABC):
    """A form of the KV cache.

    Attributes:
        inputs: names of the graph's inputs besides the cache.
    """

    inputs: tuple[str, ...]

    @abstractmethod
    def rows(self) -> int:
        """Tokens that the cache of new sequences has room for."""

    @abstractmethod
    def feeds(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> Arrays:
        """The inputs for new tokens.

        Args:
            ids: int64 [B, S].
            mask: int64 [B, P+S], of all tokens; 0 is padding.
            positions: int64 [B, S], of real tokens.
            wanted: int64 [B, L], the tokens whose logits are wanted.
        """

    @abstractmethod
    def arranged(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Rows of new tokens [B, S, width] as the graph has them."""

    def led(self, name: str, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """An inner tensor by its name as the graph has it; the rows of an expert stay as they are."""
        return rows if is_routed(name) else self.arranged(rows, mask)

    @abstractmethod
    def restored(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> Arrays:
        """Outputs with tokens in the places where `mask` has them: [B, S, width], split into heads
        [B, heads, S, width], of the cache [B, kv_heads, P+S, width]; what is at padding means nothing.
        Logits are those that were wanted already, and the rows of an expert stay as they are.
        """


@dataclass(frozen=True)
class Growing(CacheForm):
    """The past goes in, and comes out with the new tokens behind it."""

    inputs = ("input_ids", "attention_mask", "position_ids", "logits_indices")

    def rows(self) -> int:
        """None."""
        return 0

    def feeds(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> Arrays:
        """As they are."""
        return dict(zip(self.inputs, (ids, mask, positions, wanted), strict=True))

    def arranged(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """As they are."""
        return rows

    def restored(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> Arrays:
        """As they are."""
        return dict(outputs)


@dataclass(frozen=True)
class Static(CacheForm):
    """The cache has so many rows, and each sequence fills its own from the first on: padding goes
    to the right of a sequence's new tokens, where the next ones overwrite it.
    """

    capacity: int
    inputs = ("input_ids", WRITE_INDICES, "logits_indices")

    def rows(self) -> int:
        """All."""
        return self.capacity

    def feeds(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> Arrays:
        """Real tokens first, and how many each sequence has already."""
        import numpy as np

        tokens = ids.shape[1]
        filled = mask[:, : mask.shape[1] - tokens].sum(1, dtype=np.int64)
        if mask[:, -tokens:].all():
            return dict(zip(self.inputs, (ids, filled, wanted), strict=True))
        first = _real_first(mask[:, -tokens:])
        return {
            "input_ids": np.take_along_axis(ids, first, 1),
            WRITE_INDICES: filled,
            "logits_indices": np.take_along_axis(np.argsort(first, 1), wanted, 1),
        }

    def arranged(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Real tokens first."""
        import numpy as np

        return np.take_along_axis(rows, _real_first(mask[:, -rows.shape[1] :])[..., None], 1)

    def restored(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> Arrays:
        """Tokens moved back to where they came from."""
        import numpy as np

        found: Arrays = {}
        for name, array in outputs.items():
            if name == "logits" or is_routed(name):
                found[name] = array
                continue
            axis = 2 if array.ndim == 4 else 1
            count = mask.shape[1] if is_cache(name) else array.shape[axis]
            rows = array[:, :, :count] if is_cache(name) else array
            first = _real_first(mask[:, mask.shape[1] - count :])
            places = first[:, None, :, None] if axis == 2 else first[..., None]
            found[name] = np.empty_like(rows)
            np.put_along_axis(found[name], places, rows, axis)
        return found


def cache_bits(graph: onnx.GraphProto) -> int:
    """Bits of a decoder's KV cache, by its attention nodes."""
    from plugins.cached_attention import FLOAT_BITS, is_attention

    nodes = (node for node in graph.node if is_attention(node.domain))
    return next(
        (item.i for node in nodes for item in node.attribute if item.name == "bits"), FLOAT_BITS
    )


def with_numbers(outputs: Mapping[str, np.ndarray], bits: int, dtype: str) -> Arrays:
    """Outputs with what the codes of a low-bit cache stand for in place of them and their scales.

    Args:
        bits: of the cache.
        dtype: the model's, to which the numbers are rounded; bfloat16 is returned as fp32.
    """
    import ml_dtypes
    import numpy as np

    from plugins.cached_attention.codes import stored_values

    end = "_scale"
    names = [name for name in outputs if is_cache(name) and name.endswith(end)]
    found: Arrays = {name: array for name, array in outputs.items() if name not in names}
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    for name in names:
        codes = name.removesuffix(end)
        numbers = stored_values(outputs[codes], outputs[name], bits, kind)
        found[codes] = numbers.astype(np.float32) if dtype == "bfloat16" else numbers
    return found


def _real_first(mask: np.ndarray) -> np.ndarray:
    """Columns [B, S] of a mask, those of each row's real tokens before those of its padding."""
    import numpy as np

    return np.argsort(mask == 0, 1, kind="stable")


def cache_form(inputs: Mapping[str, Sequence[int | str]]) -> CacheForm:
    """Of a graph with these inputs, given by their shapes."""
    if WRITE_INDICES not in inputs:
        return Growing()
    capacity = inputs["past_key_values.0.key"][2]
    return Static(int(capacity))
