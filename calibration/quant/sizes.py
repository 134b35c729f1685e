"""How much room quantised linears take: the tensors of each, and its bits with scales and zero
points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from calibration.checkpoints.safetensors import TensorSpec

if TYPE_CHECKING:
    from calibration.families.steps import Linears
    from calibration.quant.scheme import QuantScheme

__all__ = ["linear_specs", "node_bits", "node_weights", "stored_bits"]


def linear_specs(
    name: str, shape: tuple[int, int], has_bias: bool, scheme: QuantScheme
) -> Iterator[TensorSpec]:
    """The tensors of a quantised linear of shape (out_features, in_features), in the order of the
    quant folder.
    """
    rows, groups = shape[0], scheme.attributes(*shape, has_bias).n_groups
    qqq, fp32 = scheme.op == "QQQGemm", np.dtype(np.float32)
    yield TensorSpec(f"{name}.codes", np.dtype(np.int8 if qqq else np.uint8), shape)
    yield TensorSpec(f"{name}.scale", fp32, (rows, 1 if qqq else groups))
    if not qqq:
        yield TensorSpec(f"{name}.zero", np.dtype(np.int32), (rows, groups))
    elif scheme.group_size:
        yield TensorSpec(f"{name}.scale_group", np.dtype(np.float16), (rows, groups))
    if has_bias:
        yield TensorSpec(f"{name}.bias", fp32, (rows,))


def stored_bits(specs: Iterable[TensorSpec], scheme: QuantScheme) -> int:
    """Bits of a linear's tensors: codes packed to their planes, scales, zero points and bias as
    they are, no padding of the kernels.
    """
    code_bits = scheme.attributes(1, 1, False).planes if scheme.op == "ABQGemm" else scheme.wbits
    return sum(
        math.prod(spec.shape) * code_bits if spec.name.endswith(".codes") else spec.nbytes * 8
        for spec in specs
    )


def node_bits(node: Linears, scheme: QuantScheme) -> int:
    """Bits of a GEMM node in a scheme: what its linears take together."""
    return sum(
        stored_bits(linear_specs("", linear.shape, linear.bias, scheme), scheme)
        for linear in node.members
    )


def node_weights(node: Linears) -> int:
    """Weights of a GEMM node."""
    return node.out_features * node.in_features
