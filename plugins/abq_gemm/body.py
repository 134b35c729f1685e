"""ABQGemm in standard ONNX ops: planes unpacked by shifts (folded at load), integer products, exact
zero-point terms.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from plugins.abq_gemm.layout import WEIGHT_ONLY, WORD
from plugins.core.onnx_body import CODE_OFFSET, BodyBuilder
from plugins.core.op_spec import GemmAttributes, GemmScheme

__all__ = ["function_body", "unpacked_bytes"]

# Bytes per weight that ONNX Runtime holds while it folds the unpacking: for each plane, for the
# codes, and for the weights as numbers. Of SmolLM2-135M, per weight of its linears: 31 (W4A4), 55
# (W8A8), 46 (W4A16).
_PER_PLANE, _CODES, _NUMBERS = 6, 7, 15


def unpacked_bytes(scheme: GemmScheme) -> int:
    """See OpSpec.unpacked_bytes."""
    return _PER_PLANE * scheme.planes + _CODES + (_NUMBERS if scheme.abits == WEIGHT_ONLY else 0)


def function_body(attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
    """The local function of this scheme; of the sizes only whether there are groups matters."""
    body = BodyBuilder(attrs, dtype)
    codes = _weight_codes(body)
    body.finish(_weight_only(body, codes) if attrs.abits == WEIGHT_ONLY else _integer(body, codes))
    return body.function(
        "ABQGemm", ["X", "weight", "scale", "zero", *attrs.optional_inputs], domain
    )


def _group_len(body: BodyBuilder) -> str:
    return body.feature("group_size" if body.attrs.group_size else "in_features")


def _n_groups(body: BodyBuilder) -> str:
    return body.node("Div", body.feature("in_features"), _group_len(body))


def _weight_codes(body: BodyBuilder) -> str:
    """Codes as uint8 [G, group_len, N] (G is 1 per channel), from the planes.

    The shifts run along the first axis, so that each step is a few long loops: folding is part of
    every load.
    """
    shifts = body.const(np.arange(8).reshape(8, 1, 1, 1), np.uint8)
    one, codes = body.const(1, np.uint8), ""
    for plane in reversed(range(body.attrs.planes)):
        words = body.node("Gather", "weight", body.const(plane, np.int64), axis=0)  # [N, row_words]
        bits = body.node("BitShift", body.unpacked_bytes(words), shifts, direction="RIGHT")
        bits = body.node("BitwiseAnd", bits, one)  # [8, 4, N, row_words]
        codes = (
            body.node("BitwiseOr", body.node("BitShift", codes, one, direction="LEFT"), bits)
            if codes
            else bits
        )
    codes = body.node(
        "Transpose", codes, perm=[3, 1, 0, 2]
    )  # [row_words, 4, 8, N]: channels in order, groups padded to words
    words = body.node(
        "Div", body.node("Add", _group_len(body), body.ints(WORD - 1)), body.ints(WORD)
    )
    padded = body.node("Mul", words, body.ints(WORD))
    codes = body.reshape(codes, -1, body.feature("out_features"))
    codes = body.first(codes, body.node("Mul", _n_groups(body), padded), 0)
    codes = body.reshape(codes, _n_groups(body), padded, body.feature("out_features"))
    return body.first(codes, _group_len(body), 1)


def _per_group(body: BodyBuilder, name: str) -> str:
    """scale or zero [N, G] as [G, 1, N]."""
    return body.node("Unsqueeze", body.node("Transpose", name, perm=[1, 0]), body.ints(1))


def _weight_only(body: BodyBuilder, codes: str) -> str:
    """X W^T in fp32, the weights dequantised at load."""
    zero = body.cast(_per_group(body, "zero"), TensorProto.FLOAT)
    weight = body.node("Sub", body.cast(codes, TensorProto.FLOAT), zero)
    weight = body.node("Mul", weight, _per_group(body, "scale"))
    return body.node(
        "MatMul",
        body.rows(),
        body.reshape(weight, body.feature("in_features"), body.feature("out_features")),
    )


def _integer(body: BodyBuilder, codes: str) -> str:
    """fp32 [M, N]: the groups' exact integers times their scales, summed in order, times the
    token's scale.

    sum (a - za)(q - zq) = P - T zq - za Q with P = sum a q, Q = sum q and T = sum a - group_len za:
    an integer product and a correction of rank 2 (rank 1 without za). The correction is done in
    fp64: pack() sees to it that each term is a whole number below 2^53. int64 gives the same in
    more passes over [M, N]: 44 against 37 ms for 2048 x 3072 x 576.
    """
    a, token_scale, za = body.quantize()
    one, offset = body.const([1], np.uint8), body.const(CODE_OFFSET, np.uint8)
    a = body.node(
        "Transpose", body.reshape(a, -1, _n_groups(body), _group_len(body)), perm=[1, 0, 2]
    )  # [G, M, group_len]
    ones = body.node("Expand", one, body.join(_group_len(body), body.ints(1)))
    left = body.cast(
        body.node("MatMulInteger", a, ones, offset), TensorProto.DOUBLE
    )  # sum a, [G, M, 1]
    right = body.cast(_per_group(body, "zero"), TensorProto.DOUBLE)  # zq, [G, 1, N]
    if za:
        za = body.node("Unsqueeze", body.cast(za, TensorProto.DOUBLE), body.ints(0))
        left = body.node(
            "Sub", left, body.node("Mul", za, body.cast(_group_len(body), TensorProto.DOUBLE))
        )
        left = body.node("Concat", left, body.node("Expand", za, body.node("Shape", left)), axis=2)
        ones = body.node("Expand", one, body.join(body.ints(1), _group_len(body)))
        code_sum = body.node("MatMulInteger", ones, codes)
        right = body.node("Concat", right, body.cast(code_sum, TensorProto.DOUBLE), axis=1)
    parts = [a, codes, left, right, _per_group(body, "scale")]
    if body.attrs.group_size:
        return body.node("Mul", _sum_of_groups(body, parts), token_scale)
    return body.node(
        "Mul",
        _one_group(body, *(body.node("Squeeze", part, body.ints(0)) for part in parts)),
        token_scale,
    )


def _one_group(body: BodyBuilder, a: str, codes: str, left: str, right: str, scale: str) -> str:
    """fp32 [M, N] from a [M, group_len], codes [group_len, N], left [M, 1 or 2], right [1 or 2, N]
    and scale [1, N].
    """
    product = body.node("MatMulInteger", a, codes, body.const(CODE_OFFSET, np.uint8))
    integer = body.node("Gemm", left, right, body.cast(product, TensorProto.DOUBLE), alpha=-1.0)
    return body.node("Mul", body.cast(integer, TensorProto.FLOAT), scale)


def _sum_of_groups(body: BodyBuilder, parts: list[str]) -> str:
    """fp32 [M, N], one group after the other: the kernel's order to the last bit, and memory for
    one group only.
    """
    loop = BodyBuilder(body.attrs, body.dtype, prefix="g")
    types = [
        TensorProto.UINT8,
        TensorProto.UINT8,
        TensorProto.DOUBLE,
        TensorProto.DOUBLE,
        TensorProto.FLOAT,
    ]
    names = ["group_a", "group_codes", "group_left", "group_right", "group_scale"]
    loop.node("Add", "sum", _one_group(loop, *names), output="next_sum")
    values = [
        helper.make_tensor_value_info(name, kind, [None, None])
        for name, kind in zip(
            ["sum", *names, "next_sum"], [TensorProto.FLOAT, *types, TensorProto.FLOAT], strict=True
        )
    ]
    graph = helper.make_graph(loop.nodes, "add_group", values[:-1], values[-1:])
    tokens = body.node("Shape", parts[0], start=1, end=2)
    start = body.node(
        "Expand", body.const([0], np.float32), body.join(tokens, body.feature("out_features"))
    )
    return body.node("Scan", start, *parts, body=graph, num_scan_inputs=len(parts))
