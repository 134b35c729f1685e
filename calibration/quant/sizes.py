"""How much room quantised linears take: the tensors of each, and its bits with scales and zero
points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from calibration.checkpoints.safetensors import TensorSpec, numpy_dtype
from plugins import op_spec

if TYPE_CHECKING:
    from calibration.families import Decoder
    from calibration.families.steps import Linears
    from calibration.quant.scheme import QuantScheme
    from plugins.core.op_spec import ArraySpec

__all__ = ["StoredItem", "node_bits", "node_weights", "stored_bits", "stored_items"]


@dataclass(frozen=True)
class StoredItem:
    """What lies together in the quant folder, with its tensors in order.

    Attributes:
        kind: "float" for a tensor that stays, "linear" for a quantized one, "order" for that of a
            GEMM node's input channels, or "rope" for the rotary frequencies.
        name: of the tensor or linear; of an order the node.
        specs: its tensors.
        scheme: of the linear; the base's otherwise.
        bits: of a linear, its codes packed to their bits; one that stays in floating point has its
            weight's.
    """

    kind: str
    name: str
    specs: tuple[TensorSpec, ...]
    scheme: QuantScheme
    bits: int = 0


def stored_items(
    decoder: Decoder,
    base: QuantScheme,
    scheme_of: Callable[[str], QuantScheme],
) -> Iterator[StoredItem]:
    """Everything that the quant folder of a model holds, in order.

    Args:
        decoder: of the model.
        base: its type is that of all that is not quantized.
        scheme_of: of a linear, by its full name.
    """
    rest, floats = numpy_dtype(base.dtype), frozenset(decoder.floats)
    for name, shape in decoder.shapes().items():
        owner, _, end = name.rpartition(".")
        linear = decoder.linears.get(owner)
        if linear is None:
            weight = owner in floats and end == "weight"
            bits = 8 * rest.itemsize * prod(shape) if weight else 0
            yield StoredItem("float", name, (TensorSpec(name, rest, shape),), base, bits)
        elif end == "weight":
            scheme = scheme_of(owner)
            layer = linear.shape, linear.bias, scheme
            yield StoredItem(
                "linear", owner, tuple(linear_specs(owner, *layer)), scheme, stored_bits(*layer)
            )
    for node, (name, width) in decoder.orders.items():
        order = TensorSpec(name, np.dtype(np.int32), (width,))
        yield StoredItem("order", node, (order,), base)
    for name, (step, _) in decoder.frequencies.items():
        rope = TensorSpec(name, np.dtype(np.float32), (decoder.rotated(step) // 2,))
        yield StoredItem("rope", name, (rope,), base)


def linear_specs(
    name: str, shape: tuple[int, int], has_bias: bool, scheme: QuantScheme
) -> Iterator[TensorSpec]:
    """The tensors of a quantised linear of shape (out_features, in_features), in the order of the
    quant folder.
    """
    for array in _arrays(shape, has_bias, scheme):
        yield TensorSpec(f"{name}.{array.name}", np.dtype(array.dtype), array.shape)


def stored_bits(shape: tuple[int, int], has_bias: bool, scheme: QuantScheme) -> int:
    """Bits of a linear's tensors: codes packed to their bits, scales, zero points and bias as they
    are, no padding of the kernels.
    """
    return sum(array.stored_bits for array in _arrays(shape, has_bias, scheme))


def _arrays(shape: tuple[int, int], has_bias: bool, scheme: QuantScheme) -> tuple[ArraySpec, ...]:
    return op_spec(scheme.op).arrays(scheme.attributes(*shape, has_bias))


def node_bits(node: Linears, scheme: QuantScheme) -> int:
    """Bits of a GEMM node in a scheme: what its linears take together."""
    return sum(stored_bits(linear.shape, linear.bias, scheme) for linear in node.members)


def node_weights(node: Linears) -> int:
    """Weights of a GEMM node."""
    return node.out_features * node.in_features
