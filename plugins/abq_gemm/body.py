"""ABQGemm in standard ONNX ops: planes unpacked by shifts (folded at load), integer products, exact
zero-point terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def function_body(
    attrs: GemmAttributes, inputs: Sequence[str], dtype: int, domain: str
) -> onnx.FunctionProto:
    """The local function of this scheme; of the sizes only whether there are groups matters."""
    body = BodyBuilder(attrs, dtype)
    codes = _weight_codes(body)
    body.finish(_weight_only(body, codes) if attrs.abits == WEIGHT_ONLY else _integer(body, codes))
    return body.function("ABQGemm", inputs, domain)


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
    """scale, zero or minimum [N, G] as [G, 1, N]."""
    return body.node("Unsqueeze", body.node("Transpose", name, perm=[1, 0]), body.ints(1))


def _weight_only(body: BodyBuilder, codes: str) -> str:
    """X W^T in fp32, the weights dequantised at load."""
    if body.attrs.has_minimum:
        weight = body.node("Mul", body.cast(codes, TensorProto.FLOAT), _per_group(body, "scale"))
        weight = body.node("Add", weight, _per_group(body, "minimum"))
    else:
        zero = body.cast(_per_group(body, "zero"), TensorProto.FLOAT)
        weight = body.node("Sub", body.cast(codes, TensorProto.FLOAT), zero)
        weight = body.node("Mul", weight, _per_group(body, "scale"))
    return body.node(
        "MatMul",
        body.rows(),
        body.reshape(weight, body.feature("in_features"), body.feature("out_features")),
    )


def _integer(body: BodyBuilder, codes: str) -> str:
    """fp32 [M, N]: the groups' exact integers times their scales, plus what a minimum adds, summed in
    order, times the token's scale.

    sum (a - za)(q - zq) = P - T zq - za Q with P = sum a q, Q = sum q and T = sum a - group_len za:
    an integer product and a correction of rank 2 (rank 1 without za). The correction is done in
    fp64: pack() sees to it that each term is a whole number below 2^53. int64 gives the same in
    more passes over [M, N]: 44 against 37 ms for 2048 x 3072 x 576. With a minimum there is no zq,
    and T times the minimum is added in fp32.
    """
    a, token_scale, za = body.quantize()
    one, offset = body.const([1], np.uint8), body.const(CODE_OFFSET, np.uint8)
    a = body.node(
        "Transpose", body.reshape(a, -1, _n_groups(body), _group_len(body)), perm=[1, 0, 2]
    )  # [G, M, group_len]
    ones = body.node("Expand", one, body.join(_group_len(body), body.ints(1)))
    sums = body.cast(
        body.node("MatMulInteger", a, ones, offset), TensorProto.DOUBLE
    )  # sum a, [G, M, 1]
    left, right = [], []  # whose products are subtracted: [G, M, 1] each and [G, 1, N] each
    if not body.attrs.has_minimum:
        right.append(body.cast(_per_group(body, "zero"), TensorProto.DOUBLE))  # zq
    if za:
        za = body.node("Unsqueeze", body.cast(za, TensorProto.DOUBLE), body.ints(0))
        sums = body.node(
            "Sub", sums, body.node("Mul", za, body.cast(_group_len(body), TensorProto.DOUBLE))
        )
        left.append(body.node("Expand", za, body.node("Shape", sums)))
    if not body.attrs.has_minimum:
        left.insert(0, sums)
    parts = {"a": a, "codes": codes, "left": body.beside(left, 2)}
    if za:
        ones = body.node("Expand", one, body.join(body.ints(1), _group_len(body)))
        code_sum = body.node("MatMulInteger", ones, codes)
        right.append(body.cast(code_sum, TensorProto.DOUBLE))
    parts |= {"right": body.beside(right, 1), "scale": _per_group(body, "scale")}
    if body.attrs.has_minimum:
        parts["sums"] = body.cast(sums, TensorProto.FLOAT)
        parts["minimum"] = _per_group(body, "minimum")
    parts = {name: part for name, part in parts.items() if part}
    if body.attrs.group_size:
        return body.node("Mul", _sum_of_groups(body, parts), token_scale)
    whole = {name: body.node("Squeeze", part, body.ints(0)) for name, part in parts.items()}
    return body.node("Mul", _one_group(body, whole), token_scale)


def _one_group(body: BodyBuilder, parts: Mapping[str, str]) -> str:
    """fp32 [M, N] from a [M, group_len], codes [group_len, N] and scale [1, N]; left [M, 1 or 2] and
    right [1 or 2, N], whose product is subtracted, if there are; and sums [M, 1] and minimum [1, N],
    whose product is added, if there are.
    """
    integer = body.node(
        "MatMulInteger", parts["a"], parts["codes"], body.const(CODE_OFFSET, np.uint8)
    )
    if "left" in parts:
        product = body.cast(integer, TensorProto.DOUBLE)
        integer = body.node("Gemm", parts["left"], parts["right"], product, alpha=-1.0)
    term = body.node("Mul", body.cast(integer, TensorProto.FLOAT), parts["scale"])
    if "minimum" in parts:
        term = body.node("Add", term, body.node("Mul", parts["sums"], parts["minimum"]))
    return term


_TYPES = {
    "a": TensorProto.UINT8,
    "codes": TensorProto.UINT8,
    "left": TensorProto.DOUBLE,
    "right": TensorProto.DOUBLE,
}  # the others are fp32


def _sum_of_groups(body: BodyBuilder, parts: Mapping[str, str]) -> str:
    """fp32 [M, N], one group after the other: the kernel's order to the last bit, and memory for
    one group only.
    """
    loop = BodyBuilder(body.attrs, body.dtype, prefix="g")
    names = {name: f"group_{name}" for name in parts}
    loop.node("Add", "sum", _one_group(loop, names), output="next_sum")
    kinds = {"sum": TensorProto.FLOAT}
    kinds |= {names[name]: _TYPES.get(name, TensorProto.FLOAT) for name in parts}
    values = [
        helper.make_tensor_value_info(name, kind, [None, None])
        for name, kind in [*kinds.items(), ("next_sum", TensorProto.FLOAT)]
    ]
    graph = helper.make_graph(loop.nodes, "add_group", values[:-1], values[-1:])
    tokens = body.node("Shape", parts["a"], start=1, end=2)
    start = body.node(
        "Expand", body.const([0], np.float32), body.join(tokens, body.feature("out_features"))
    )
    return body.node("Scan", start, *parts.values(), body=graph, num_scan_inputs=len(parts))
