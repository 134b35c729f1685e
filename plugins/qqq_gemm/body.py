"""QQQGemm in standard ONNX ops: nibbles unpacked to int8 weights (folded at load), then one
MatMulInteger.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from plugins.core.onnx_body import CODE_OFFSET, BodyBuilder
from plugins.core.op_spec import GemmAttributes, GemmScheme
from plugins.qqq_gemm.layout import INT8_MAX, OFFSET, TILE_K, nibble_order

__all__ = ["function_body", "unpacked_bytes"]

# Bytes per weight that ONNX Runtime holds while it folds the unpacking, of SmolLM2-135M
_PER_CHANNEL, _PER_GROUP = 18, 47


def unpacked_bytes(scheme: GemmScheme) -> int:
    """See OpSpec.unpacked_bytes."""
    return _PER_GROUP if scheme.group_size else _PER_CHANNEL


def function_body(attrs: GemmAttributes, dtype: int, domain: str) -> onnx.FunctionProto:
    """The local function of this scheme; of the sizes only whether there are groups matters."""
    body = BodyBuilder(attrs, dtype)
    weight, weight_offset = _int8_weights(body)
    a, token_scale, _ = body.quantize()
    offsets = body.const(CODE_OFFSET, np.uint8), body.const(weight_offset, np.uint8)
    integer = body.node("MatMulInteger", a, weight, *offsets)
    y = body.node(
        "Mul", body.cast(integer, TensorProto.FLOAT), body.node("Transpose", "scale", perm=[1, 0])
    )
    body.finish(body.node("Mul", y, token_scale))
    optional = [*(["scale_group"] if attrs.group_size else []), *attrs.optional_inputs]
    return body.function("QQQGemm", ["X", "weight", "scale", *optional], domain)


def _int8_weights(body: BodyBuilder) -> tuple[str, int]:
    """(int8 weights + offset as uint8 [K, N], offset)."""
    codes = _codes(body)
    if not body.attrs.group_size:
        return codes, OFFSET
    k, n, group = (
        body.feature("in_features"),
        body.feature("out_features"),
        body.feature("group_size"),
    )
    weight = body.node("Sub", body.cast(codes, TensorProto.FLOAT), body.const(OFFSET, np.float32))
    weight = body.reshape(weight, body.node("Div", k, group), group, n)
    scale = body.node(
        "Unsqueeze", body.cast("scale_group", TensorProto.FLOAT), body.ints(1)
    )  # [G, 1, N]
    weight = body.node("Round", body.node("Mul", weight, scale))
    weight = body.node(
        "Clip", weight, body.const(-INT8_MAX, np.float32), body.const(INT8_MAX, np.float32)
    )
    weight = body.node("Add", weight, body.const(CODE_OFFSET, np.float32))
    return body.reshape(body.cast(weight, TensorProto.UINT8), k, n), CODE_OFFSET


def _codes(body: BodyBuilder) -> str:
    """code + OFFSET as uint8 [K, N], from the nibbles."""
    grouped = bool(body.attrs.group_size)
    pairs = body.unpacked_bytes("weight")  # [4, K/16, 2N]
    low = body.node("BitwiseAnd", pairs, body.const(15, np.uint8))
    high = body.node("BitShift", pairs, body.const(4, np.uint8), direction="RIGHT")
    k_tiles = body.node("Shape", "weight", start=0, end=1)
    nibbles = body.reshape(body.node("Concat", low, high, axis=0), 8, k_tiles, -1, 8, 4, 4)
    order = nibble_order(
        grouped
    )  # slice 4h + i [K/16, N/64, lane/4, lane%4, j] holds nibble e = 2i + h of the words
    by_rank = [order.index((b, r)) for r in range(4) for b in range(2)]
    nibbles = body.node(
        "Gather", nibbles, body.ints(*(e // 2 + 4 * (e % 2) for e in by_rank)), axis=0
    )
    if not grouped:
        nibbles = body.node(
            "BitwiseXor", nibbles, body.const(8, np.uint8)
        )  # two's complement to code + 8
    nibbles = body.reshape(
        nibbles, 4, 2, k_tiles, -1, 8, 4, 4
    )  # [r, b, K/16, N/64, lane/4, lane%4, j]
    nibbles = body.node(
        "Transpose", nibbles, perm=[2, 5, 0, 3, 6, 1, 4]
    )  # k = (K/16, lane%4, r), n = (N/64, j, b, lane/4)
    k_pad = body.node("Mul", k_tiles, body.ints(TILE_K))
    codes = body.reshape(nibbles, k_pad, -1)
    return body.first(
        body.first(codes, body.feature("in_features"), 0), body.feature("out_features"), 1
    )
