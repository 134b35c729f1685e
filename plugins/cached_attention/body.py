"""CachedAttention in standard ONNX ops: the cache takes the new keys and values in, then queries meet
it. TensorRT inlines the function and fuses what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from plugins.cached_attention import DOMAIN, OP
from plugins.core.onnx_body import OPSET, NodeBuilder

__all__ = ["STATIC_OPSET", "AttentionForm", "function_body"]

STATIC_OPSET = 24  # TensorScatter is a standard op from here on
KINDS = ("key", "value")


@dataclass(frozen=True)
class AttentionForm:
    """What nodes of one function have in common.

    Attributes:
        static: the cache has a fixed capacity, and new rows are written into it at write_indices;
            else it grows by them.
        capped: scores go through softcap tanh(x / softcap).
    """

    static: bool = False
    capped: bool = False

    @property
    def opset(self) -> int:
        """Of the standard ops in the body."""
        return STATIC_OPSET if self.static else OPSET

    @property
    def inputs(self) -> list[str]:
        """Names of the function's inputs: query [B, heads, S, D], key and value
        [B, kv_heads, S, D], past_key and past_value [B, kv_heads, P, D], mask bool [B, 1, S, T],
        true where a query may look, and of a static cache, whose P and T are its capacity,
        write_indices int64 [B]: where the first new row goes.
        """
        names = ["query", "key", "value", "past_key", "past_value", "mask"]
        return [*names, "write_indices"] if self.static else names

    @property
    def outputs(self) -> list[str]:
        """Names of the function's outputs: context [B, S, heads D], present_key and present_value
        [B, kv_heads, T, D].
        """
        return ["context", "present_key", "present_value"]


def function_body(form: AttentionForm, dtype: int, domain: str = DOMAIN) -> onnx.FunctionProto:
    """The local function; nodes that call it have the attributes scale and softcap, floats.

    Args:
        dtype: onnx.TensorProto type of queries, keys and values.
    """
    body = NodeBuilder(dtype)
    for kind in KINDS:
        if form.static:
            inputs, how = [f"past_{kind}", kind, "write_indices"], ("TensorScatter", {"axis": -2})
        else:
            inputs, how = [f"past_{kind}", kind], ("Concat", {"axis": 2})
        body.node(how[0], *inputs, output=f"present_{kind}", **how[1])
    heads = _capped(body) if form.capped else _attention(body)
    rows = body.node("Transpose", heads, perm=[0, 2, 1, 3])
    body.node("Reshape", rows, body.ints(0, 0, -1), output="context")
    return helper.make_function(
        domain,
        OP,
        form.inputs,
        form.outputs,
        body.nodes,
        [helper.make_opsetid("", form.opset)],
        ["scale", "softcap"],
    )


def _attention(body: NodeBuilder) -> str:
    """One output, no past inside, a mask and no is_causal: what TensorRT's parser takes."""
    heads = body.node("Attention", "query", "present_key", "present_value", "mask", output="heads")
    body.nodes[-1].attribute.append(_of_the_call("scale", "scale"))
    body.nodes[-1].name = "attention"
    return heads


def _capped(body: NodeBuilder) -> str:
    """Attention in its parts, since TensorRT's has no softcap.

    The query heads of a key-value head lie below each other in one matrix, so that keys and values
    are not repeated. Scores, weights and context are of the model's type, all between fp32.
    """
    sizes = {
        name: body.node("Shape", source, start=axis, end=axis + 1)
        for name, source, axis in (
            ("heads", "query", 1),
            ("kv_heads", "present_key", 1),
            ("head_dim", "query", 3),
        )
    }
    keep, rest = body.ints(0), body.ints(-1)

    def reshaped(x: str, *shape: str) -> str:
        return body.node("Reshape", x, body.join(*shape))

    query = reshaped("query", keep, sizes["kv_heads"], rest, sizes["head_dim"])
    keys = body.node("Transpose", "present_key", perm=[0, 1, 3, 2])
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
    context = body.node("MatMul", weights, "present_value")
    return reshaped(context, keep, sizes["heads"], rest, sizes["head_dim"])


def _of_the_call(name: str, attribute: str) -> onnx.AttributeProto:
    return onnx.AttributeProto(name=name, ref_attr_name=attribute, type=onnx.AttributeProto.FLOAT)


def _constant_of_the_call(body: NodeBuilder, attribute: str) -> str:
    name = body.node("Constant")
    body.nodes[-1].attribute.append(_of_the_call("value_float", attribute))
    return name
