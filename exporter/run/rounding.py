"""Rewrites a graph so that ONNX Runtime's CPU provider rounds where the graph says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.graph.names import is_cache, is_layer_output
from plugins.core.function import is_inlined

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["round_every_op"]


class _Work(NamedTuple):
    """How a standard op that computes is run.

    Attributes:
        inputs: how many of its inputs, from the first on, are floats to compute with.
        precise: in fp64, because fp32 results differ between libraries; else in fp32, where
            products and sums of two 16-bit numbers are as good as exact.
    """

    inputs: int
    precise: bool = False


# Every standard op that the writer uses: those that compute, and those that round nothing.
_COMPUTES = {
    "Add": _Work(2),
    "Attention": _Work(3, precise=True),
    "Clip": _Work(1),
    "Div": _Work(2),
    "Exp": _Work(1, precise=True),
    "Floor": _Work(1),
    "Gelu": _Work(1, precise=True),
    "MatMul": _Work(2, precise=True),  # but for tables of weights, see _precise
    "Max": _Work(2),
    "Min": _Work(2),
    "Mul": _Work(2),
    "Neg": _Work(1),
    "RMSNormalization": _Work(2, precise=True),
    "ReduceLogSumExp": _Work(1, precise=True),
    "ReduceMax": _Work(1),
    "ReduceMin": _Work(1),
    "ReduceSum": _Work(1),
    "Relu": _Work(1),
    "RotaryEmbedding": _Work(3),
    "Round": _Work(1),
    "Sigmoid": _Work(1, precise=True),
    "Softmax": _Work(1, precise=True),
    "Tanh": _Work(1, precise=True),
}
_MOVES = {
    "Cast",
    "Concat",
    "Constant",
    "Gather",
    "GatherND",
    "Reshape",
    "ScatterElements",
    "Split",
    "Squeeze",
    "TensorScatter",
    "TopK",
    "Transpose",
    "Unsqueeze",
}
_COUNTS = {"Range", "Shape", "Sub"}
_COMPARES = {"And", "Equal", "GreaterOrEqual", "LessOrEqual", "Or", "Where"}


def round_every_op(model: onnx.ModelProto) -> None:
    """Rewrite a graph so that ONNX Runtime's CPU provider rounds wherever the graph says so, and
    nowhere else.

    The provider has few fp16 and hardly any bfloat16 kernels. It casts around fp16 ops by itself
    but then drops the casts between two of them, so a custom op sees an input that was never
    rounded, and its activation codes differ from a real 16-bit run in about one of 2^(abits+2)
    places. Here each standard op computes in fp32, or in fp64 where fp32 results differ between
    libraries, and its result is rounded by a cast that stays, to the model's type, or to fp32
    between the graph's own casts to fp32 and back: what the torch reference does too, so that the
    two agree to the last bit nearly everywhere and a chaotic low-bit model does not drift.
    bfloat16, which numpy lacks, becomes fp32 with the same values at the graph's inputs and
    outputs.
    """
    from onnx import TensorProto

    half = next(
        value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input)
        if is_layer_output(value.name) or is_cache(value.name)
    )
    if half == TensorProto.BFLOAT16:
        _carry_ends_in_float32(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    wide = {
        value.name
        for value in model.graph.input
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    _round_nodes(model.graph.node, half, constants, wide)
    for function in model.functions:
        if is_inlined(function.domain):  # the others round by themselves
            _round_nodes(function.node, half, set(), set())


def _round_nodes(nodes: Any, half: int, constants: set[str], float32: set[str]) -> None:
    """Rewrite the nodes of a graph or function.

    Args:
        nodes: the repeated field.
        half: the model's type.
        constants: tensors that never change.
        float32: tensors of this type; those behind a cast to it are added.
    """
    from onnx import TensorProto

    counts: set[str] = set()
    integers: set[str] = set()  # what is computed of numbers that a cast or Range made
    found: list[onnx.NodeProto] = []
    for node in nodes:
        if _gives_float32(node, float32):
            float32.update(node.output[:1] if node.op_type == "TopK" else node.output)
        if node.op_type == "Transpose" and node.input[0] in constants:
            constants.update(node.output)
        counted = node.op_type == "Add" and not counts.isdisjoint(node.input)
        if counted or node.op_type in _COUNTS:
            counts.update(node.output)
        if _gives_integers(node, integers):
            integers.update(node.output)
            counted = True
        if counted or node.domain or node.op_type in _MOVES | _COUNTS | _COMPARES:
            found.append(node)
        elif node.op_type in _COMPUTES:
            dtype = TensorProto.FLOAT if node.output[0] in float32 else half
            found += _computed_wide(node, dtype, _precise(node, constants))
        else:
            raise ValueError(f"{node.name}: got {node.op_type}, for which no rounding is known")
    del nodes[:]
    nodes.extend(found)


def _gives_float32(node: onnx.NodeProto, float32: set[str]) -> bool:
    from onnx import TensorProto

    if node.op_type == "Cast":
        return _gives(node, TensorProto.FLOAT)
    if node.op_type == "Constant":
        value = node.attribute[0]
        return bool(value.name == "value_float" or value.t.data_type == TensorProto.FLOAT)
    return not node.domain and any(name in float32 for name in node.input)


def _gives_integers(node: onnx.NodeProto, integers: set[str]) -> bool:
    from onnx import TensorProto

    if node.op_type == "Cast":
        return _gives(node, TensorProto.INT64)
    first = node.input[0] if node.input else ""
    return not node.domain and (node.op_type == "Range" or first in integers)


def _gives(node: onnx.NodeProto, dtype: int) -> bool:
    """Whether a node casts to a type."""
    kinds = (item.i for item in node.attribute if item.name == "to")
    return node.op_type == "Cast" and dtype in kinds


def _precise(node: onnx.NodeProto, constants: set[str]) -> bool:
    """Whether a node computes in fp64. The head and other float linears do not: their tables would
    take twice the memory.
    """
    table = node.op_type == "MatMul" and node.input[1] in constants
    return _COMPUTES[node.op_type].precise and not table


def _carry_ends_in_float32(graph: onnx.GraphProto) -> None:
    from onnx import TensorProto

    inputs = [
        value for value in graph.input if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    ]
    # Inner tensors that are outputs need not be declared.
    wide = {TensorProto.UNDEFINED, TensorProto.BFLOAT16}
    outputs = [value for value in graph.output if value.type.tensor_type.elem_type in wide]
    inside = {value.name: f"{value.name}.bfloat16" for value in (*inputs, *outputs)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inside.get(name, name) for name in names]
    nodes = [
        *(_cast(value.name, inside[value.name], TensorProto.BFLOAT16) for value in inputs),
        *graph.node,
        *(_cast(inside[value.name], value.name, TensorProto.FLOAT) for value in outputs),
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*inputs, *outputs):
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _computed_wide(node: onnx.NodeProto, dtype: int, precise: bool) -> list[onnx.NodeProto]:
    """The node between casts to a wide type and back to its own; attention and rotation in their
    parts, since ONNX Runtime has no fp64 kernels for them.
    """
    from onnx import TensorProto

    if dtype == TensorProto.FLOAT and node.op_type == "RotaryEmbedding":
        precise = True  # products of 16-bit numbers are exact in fp32, those of fp32 in fp64
    if dtype == TensorProto.FLOAT and not precise:
        return [node]
    casts, output = [], node.output[0]
    for index in range(_COMPUTES[node.op_type].inputs):
        wide = f"{output}.input{index}"
        casts.append(
            _cast(node.input[index], wide, TensorProto.DOUBLE if precise else TensorProto.FLOAT)
        )
        node.input[index] = wide
    node.output[0] = f"{output}.wide"
    parts = {"Attention": _attention_parts, "RotaryEmbedding": _rotation_parts}
    split = precise and node.op_type in parts
    return [
        *casts,
        *(parts[node.op_type](node) if split else [node]),
        _cast(node.output[0], output, dtype),
    ]


def _rotation_parts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """RotaryEmbedding of X [B, H, S, D] by tables [P, width / 2] at positions [B, S]: (a, b) at places
    i and i + width / 2 becomes (a cos - b sin, a sin + b cos); places behind the width stay.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    x, cos, sin, positions = node.input
    prefix, nodes = node.output[0], []

    def add(op: str, *inputs: str, name: str, **attributes: Any) -> str:
        output = f"{prefix}.{name}" if name else prefix
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def const(name: str, value: int) -> str:
        return add("Constant", name=name, value=numpy_helper.from_array(np.array([value])))

    waves = []
    for name, table in (("cos", cos), ("sin", sin)):
        rows = add("Gather", table, positions, name=f"{name}_rows", axis=0)
        waves.append(add("Unsqueeze", rows, const(f"{name}_axis", 1), name=f"{name}_wave"))
    half = add("Shape", cos, name="half", start=1, end=2)
    width = add("Add", half, half, name="width")
    ends = [const("zero", 0), half, width, const("end", np.iinfo(np.int64).max)]
    low, high, still = (
        add("Slice", x, *ends[part : part + 2], const(f"axis{part}", 3), name=f"part{part}")
        for part in range(3)
    )
    products = {
        f"{part}{wave}": add("Mul", rows, waves[wave], name=f"product{part}{wave}")
        for part, rows in enumerate((low, high))
        for wave in range(2)
    }
    turned = add("Sub", products["00"], products["11"], name="turned_low")
    other = add("Add", products["01"], products["10"], name="turned_high")
    add("Concat", turned, other, still, name="", axis=3)
    return nodes


def _attention_parts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """softmax(scale Q K^T where the mask allows) V of Q [B, H, S, D], K and V [B, KV, T, D], mask
    [B, 1, S, T], by query groups.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    query, key, value, mask = node.input
    prefix, nodes = node.output[0], []
    scale = onnx.AttributeProto()  # a number, or the name of one that the call gives
    scale.CopyFrom(next(item for item in node.attribute if item.name == "scale"))
    scale.name = "value_float"

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(
            helper.make_node(
                op, inputs, [f"{prefix}.{name}"], name=f"{prefix}.{name}", **attributes
            )
        )
        return f"{prefix}.{name}"

    def const(name: str, array: np.ndarray) -> str:
        return add("Constant", [], name, value=numpy_helper.from_array(array))

    heads = add("Shape", [key], "kv_heads", start=1, end=2)
    size = add("Shape", [key], "head_dim", start=3, end=4)
    minus_one, zero, two = (
        const(f"int{index}", np.array([value], np.int64)) for index, value in enumerate((-1, 0, 2))
    )
    rows = add("Shape", [query], "rows", start=2, end=3)
    grouped = add(
        "Reshape",
        [query, add("Concat", [zero, heads, minus_one, rows, size], "grouped_shape", axis=0)],
        "grouped",
    )
    keys = add("Transpose", [add("Unsqueeze", [key, two], "key5")], "keys", perm=[0, 1, 2, 4, 3])
    nodes.append(helper.make_node("Constant", [], [f"{prefix}.scale32"], name=f"{prefix}.scale32"))
    nodes[-1].attribute.append(scale)
    factor = add("Cast", [f"{prefix}.scale32"], "scale", to=TensorProto.DOUBLE)
    scores = add("Mul", [add("MatMul", [grouped, keys], "products"), factor], "scores")
    scores = add(
        "Where",
        [add("Unsqueeze", [mask, two], "mask5"), scores, const("never", np.array(-np.inf))],
        "masked",
    )
    weights = add("Softmax", [scores], "weights", axis=-1)
    context = add("MatMul", [weights, add("Unsqueeze", [value, two], "value5")], "context")
    shape = add("Shape", [query], "shape")
    nodes.append(helper.make_node("Reshape", [context, shape], [prefix], name=f"{prefix}.merge"))
    return nodes


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)
