"""CachedAttention in standard ONNX ops: the cache takes the new keys and values in, then queries meet
it. TensorRT inlines the function and fuses what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from plugins.cached_attention import DOMAIN, FLOAT_BITS, LOW_BIT_OP, OP
from plugins.cached_attention.codes import BYTE_OFFSET, SCALES
from plugins.core.onnx_body import OPSET, NodeBuilder

__all__ = ["STATIC_OPSET", "AttentionForm"]

STATIC_OPSET = 24  # TensorScatter is a standard op from here on
KINDS = ("key", "value")


@dataclass(frozen=True)
class AttentionForm:
    """What nodes of one function have in common.

    Attributes:
        static: the cache has a fixed capacity, and new rows are written into it at write_indices;
            else it grows by them.
        capped: scores go through softcap tanh(x / softcap).
        bits: of the cache, 2..8; 16: it holds numbers of the model's type.
    """

    static: bool = False
    capped: bool = False
    bits: int = FLOAT_BITS

    @property
    def op(self) -> str:
        """The op's name."""
        return OP if self.bits == FLOAT_BITS else LOW_BIT_OP

    @property
    def domain(self) -> str:
        """Of the ops."""
        return DOMAIN

    @property
    def attributes(self) -> dict[str, Any]:
        """Beside those that each node has of its own, the floats scale and softcap."""
        return {} if self.bits == FLOAT_BITS else {"bits": self.bits}

    @property
    def parts(self) -> list[str]:
        """What the cache has for each layer: keys and values, or their codes, and then scales and
        zero points.
        """
        return [*KINDS, *(f"{kind}_scale" for kind in KINDS if self.bits != FLOAT_BITS)]

    def row(self, part: str, head_dim: int, dtype: int) -> tuple[int, int]:
        """onnx.TensorProto type and width of a row of a part, in a model of this type."""
        if self.bits == FLOAT_BITS:
            return dtype, head_dim
        codes = TensorProto.INT8, self.bits * head_dim // 8
        return codes if part in KINDS else (TensorProto.FLOAT, SCALES)

    @property
    def opset(self) -> int:
        """Of the standard ops in the body."""
        return STATIC_OPSET if self.static else OPSET

    @property
    def inputs(self) -> list[str]:
        """Names of the function's inputs: query [B, heads, S, D], key and value
        [B, kv_heads, S, D], past_key and past_value [B, kv_heads, P, D], mask bool [B, 1, S, T],
        true where a query may look, and of a static cache, whose P and T are its capacity,
        write_indices int64 [B]: where the first new row goes. In a cache of few bits the past is
        int8 [B, kv_heads, P, bits D / 8], and before write_indices come past_key_scale and
        past_value_scale, fp32 [B, kv_heads, P, 2]; see codes.py.
        """
        pasts = [f"past_{part}" for part in self.parts]
        names = ["query", "key", "value", *pasts[:2], "mask", *pasts[2:]]
        return [*names, "write_indices"] if self.static else names

    @property
    def outputs(self) -> list[str]:
        """Names of the function's outputs: context [B, S, heads D], and the parts of the cache with
        the new rows, T in place of P.
        """
        return ["context", *(f"present_{part}" for part in self.parts)]

    def function(self, dtype: int) -> onnx.FunctionProto:
        """The local function.

        Args:
            dtype: onnx.TensorProto type of queries, keys and values.
        """
        body = NodeBuilder(dtype)
        low = self.bits != FLOAT_BITS
        for kind in KINDS:
            new = _stored(body, kind, self.bits) if low else (kind,)
            for part, rows in zip((kind, f"{kind}_scale"), new, strict=False):
                _take_in(body, self, part, rows)
        key, value = (
            _values(body, kind, self.bits) if low else f"present_{kind}" for kind in KINDS
        )
        heads = (_capped if self.capped else _attention)(body, key, value)
        rows = body.node("Transpose", heads, perm=[0, 2, 1, 3])
        body.node("Reshape", rows, body.ints(0, 0, -1), output="context")
        return helper.make_function(
            DOMAIN,
            self.op,
            self.inputs,
            self.outputs,
            body.nodes,
            [helper.make_opsetid("", self.opset)],
            ["scale", "softcap", *self.attributes],
        )


def _take_in(body: NodeBuilder, form: AttentionForm, part: str, rows: str) -> None:
    """A part of the cache with its new rows."""
    past, present = f"past_{part}", f"present_{part}"
    if form.static:
        body.node("TensorScatter", past, rows, "write_indices", output=present, axis=-2)
    else:
        body.node("Concat", past, rows, output=present, axis=2)


def _stored(body: NodeBuilder, kind: str, bits: int) -> tuple[str, str]:
    """codes.stored, without bit operations, which TensorRT lacks."""
    x, two = body.float32(kind), body.const(2, np.float32)
    shape = body.node("Shape", kind)
    rows = body.reshape(x, -1, body.node("Shape", kind, start=3, end=4))
    rounded, scale, zero = body.steps(rows, bits, False)
    top = 1 << (bits - 1)
    codes = body.node("Min", body.node("Add", rounded, zero), body.const(top - 1, np.float32))
    codes = body.node("Reshape", body.node("Add", codes, body.const(top, np.float32)), shape)
    codes = body.node("Reshape", codes, body.ints(0, 0, 0, -1, 8))
    weights, planes = body.const(1 << np.arange(8), np.float32), []
    higher = codes
    for _ in range(bits):
        codes, higher = higher, body.node("Floor", body.node("Div", higher, two))
        one_bit = body.node("Sub", codes, body.node("Mul", higher, two))
        eight = body.node("Mul", one_bit, weights)
        planes.append(body.node("ReduceSum", eight, body.ints(-1), keepdims=0))
    packed = body.node("Concat", *planes, axis=-1)
    packed = body.node("Sub", packed, body.const(BYTE_OFFSET, np.float32))
    lead = body.node("Shape", kind, start=0, end=3)
    scales = body.node("Concat", scale, zero, axis=-1)
    scales = body.node("Reshape", scales, body.join(lead, body.ints(SCALES)), allowzero=1)
    return body.cast(packed, TensorProto.INT8), scales


def _values(body: NodeBuilder, kind: str, bits: int) -> str:
    """codes.stored_values of all rows of the cache."""
    two = body.const(2, np.float32)
    packed = body.cast(f"present_{kind}", TensorProto.FLOAT)
    packed = body.node("Add", packed, body.const(BYTE_OFFSET, np.float32))
    packed = body.node("Reshape", packed, body.ints(0, 0, 0, bits, -1, 1))
    shifted = body.node(
        "Floor", body.node("Mul", packed, body.const(0.5 ** np.arange(8), np.float32))
    )
    higher = body.node("Floor", body.node("Div", shifted, two))
    one_bit = body.node("Sub", shifted, body.node("Mul", higher, two))
    weights = body.const((1 << np.arange(bits)).reshape(-1, 1, 1), np.float32)
    codes = body.node("ReduceSum", body.node("Mul", one_bit, weights), body.ints(3), keepdims=0)
    codes = body.node("Reshape", codes, body.ints(0, 0, 0, -1))
    codes = body.node("Sub", codes, body.const(1 << (bits - 1), np.float32))
    scale, zero = (
        body.node("Gather", f"present_{kind}_scale", body.ints(which), axis=3) for which in (0, 1)
    )
    return body.saturated(body.node("Mul", body.node("Sub", codes, zero), scale))


def _attention(body: NodeBuilder, key: str, value: str) -> str:
    """One output, no past inside, a mask and no is_causal: what TensorRT's parser takes."""
    heads = body.node("Attention", "query", key, value, "mask", output="heads")
    body.nodes[-1].attribute.append(_of_the_call("scale", "scale"))
    body.nodes[-1].name = "attention"
    return heads


def _capped(body: NodeBuilder, key: str, value: str) -> str:
    """Attention in its parts, since TensorRT's has no softcap.

    The query heads of a key-value head lie below each other in one matrix, so that keys and values
    are not repeated. Scores, weights and context are of the model's type, all between fp32.
    """
    sizes = {
        name: body.node("Shape", source, start=axis, end=axis + 1)
        for name, source, axis in (
            ("heads", "query", 1),
            ("kv_heads", "key", 1),
            ("head_dim", "query", 3),
        )
    }
    keep, rest = body.ints(0), body.ints(-1)

    def reshaped(x: str, *shape: str) -> str:
        return body.node("Reshape", x, body.join(*shape))

    query = reshaped("query", keep, sizes["kv_heads"], rest, sizes["head_dim"])
    keys = body.node("Transpose", key, perm=[0, 1, 3, 2])
    scores = body.node("MatMul", query, keys)
    scores = body.float32(reshaped(scores, keep, sizes["heads"], rest, keep))
    scale, cap = (_constant_of_the_call(body, name) for name in ("scale", "softcap"))
    inner = body.node("Tanh", body.node("Mul", scores, body.node("Div", scale, cap)))
    never = body.const(-np.inf, np.float32)
    scores = body.node("Where", "mask", body.node("Mul", inner, cap), never)
    weights = body.node("Softmax", scores, axis=-1)
    if body.dtype != TensorProto.FLOAT:
        weights = body.cast(weights, body.dtype)
    weights = reshaped(weights, keep, sizes["kv_heads"], rest, keep)
    context = body.node("MatMul", weights, value)
    return reshaped(context, keep, sizes["heads"], rest, sizes["head_dim"])


def _of_the_call(name: str, attribute: str) -> onnx.AttributeProto:
    return onnx.AttributeProto(name=name, ref_attr_name=attribute, type=onnx.AttributeProto.FLOAT)


def _constant_of_the_call(body: NodeBuilder, attribute: str) -> str:
    name = body.node("Constant")
    body.nodes[-1].attribute.append(_of_the_call("value_float", attribute))
    return name
