"""How much room quantised linears take: the tensors of each, and its bits with scales and zero
points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from calibration.checkpoints.safetensors import TensorSpec
from plugins import op_spec

if TYPE_CHECKING:
    from calibration.families.steps import Linears
    from calibration.quant.scheme import QuantScheme
    from plugins.core.op_spec import ArraySpec

__all__ = ["linear_specs", "node_bits", "node_weights", "stored_bits"]


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
