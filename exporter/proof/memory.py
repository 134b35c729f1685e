"""What a proof takes of the memory, and how it is done where that is less than all at once would take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.quant.scheme import FLOAT_BITS
from calibration.quant.sizes import node_weights
from exporter.graph.names import layer_of
from plugins import op_spec
from plugins.cores import usable_memory
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.families import Decoder
    from calibration.quant.scheme import QuantScheme

__all__ = ["Need", "check_memory", "memory_needed"]

_BASE = (
    500_000_000  # Python with torch, transformers and ONNX Runtime, and what is recorded of calls
)
_FLOAT = 4  # bytes per number of the float model, and of what is not quantized in the reference
_CODE = 1  # bytes per weight of the reference that multiplies integers


@dataclass(frozen=True)
class Need:
    """Bytes that a proof holds at its peak; one model is in memory at a time.

    Attributes:
        whole: with the function bodies of the whole graph unpacked.
        folded: with those of one decoder layer, or of the head, at a time.
        floats: with the float model.
    """

    whole: int
    folded: int
    floats: int


def memory_needed(decoder: Decoder, schemes: Mapping[str, QuantScheme]) -> Need:
    """Of a model, by how each of its GEMM nodes is quantized."""
    shapes, head = decoder.shapes(), decoder.head
    unpacked: Counter[int | None] = Counter()  # by decoder layer, and of the head
    weights, codes = 0, 0
    for node, scheme in schemes.items():
        count = node_weights(decoder.sites[node].linears)
        unpacked[layer_of(node)] += op_spec(scheme.op).unpacked_bytes(scheme.gemm) * count
        codes += (_CODE if scheme.abits < FLOAT_BITS else _FLOAT) * count
        weights += count
    parameters = sum(math.prod(shape) for shape in shapes.values())
    rest = parameters - weights
    if head.quantized and head.tied:
        rest += math.prod(shapes[f"{decoder.embedding.name}.weight"])
    reference = codes + _FLOAT * rest
    return Need(
        whole=_BASE + max(unpacked.total(), reference),
        folded=_BASE + max(*unpacked.values(), reference),
        floats=_BASE + _FLOAT * parameters,
    )


def check_memory(decoder: Decoder, schemes: Mapping[str, QuantScheme]) -> tuple[bool, bool]:
    """Compare what the proof needs with the memory that may be used, before hours of other work.

    Returns:
        Whether the function bodies have to be unpacked layer by layer, and whether the float model
        fits. Where the system does not tell of its memory (it is not Linux) all fits.

    Raises:
        InputError: not even one layer after the other fits.
    """
    free, need = usable_memory(), memory_needed(decoder, schemes)
    if free is None:
        return False, True
    if need.folded > free:
        weights = sum(node_weights(decoder.sites[node].linears) for node in schemes)
        raise InputError(
            "validation",
            f"got {free / 1e9:.2f} GB of free memory, expected {need.folded / 1e9:.2f} GB for "
            f"{weights / 1e6:.0f} M weights",
            "Use --until engine here, and validate on a machine with more memory",
        )
    return need.whole > free, need.floats <= free
