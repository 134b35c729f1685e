"""What each step of a decoder block is in ONNX; calibration/reference/steps.py says the same in
torch.

Where these nodes round to the model's type is part of what they say: every standard node's result
is rounded once, but for the nodes between casts to fp32 and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from calibration.families.decoder import Block
from calibration.families.steps import (
    Activate,
    Add,
    Attend,
    Experts,
    Gate,
    HeadNorm,
    Heads,
    Linears,
    Norm,
    Reorder,
    Rope,
    Step,
)
from exporter.graph.names import WRITE_INDICES, layer_output, new_key, past, present
from exporter.graph.writer import GraphWriter
from plugins.pointwise.forms import (
    ALL_HEADS,
    EACH_HEAD,
    NO_NORM,
    Activation,
    ResidualSum,
    RMSNorm,
    RotatedHeads,
)

__all__ = ["WRITERS", "Flow", "write_block"]


@dataclass
class Flow:
    """What runs through the steps of a block, as names of tensors.

    Attributes:
        block: the block.
        stream: the residual stream, [B, S, hidden].
        value: what the last step made.
        heads: the steps since the last GEMM node that make heads of its output; attention's step
            writes them.
        linears: the GEMM node last written.
        sums: Adds so far.
        rows: the value's axes in front of its width, for those who declare shapes.
    """

    block: Block
    stream: str
    value: str
    heads: list[Step] = field(default_factory=list)
    linears: Linears | None = None
    sums: int = 0
    rows: tuple[str | int, str] = ("B", "S")

    @property
    def module(self) -> str:
        """Prefix of names: the last GEMM node's without its last part."""
        assert self.linears is not None
        return self.block.name(self.linears.node).rpartition(".")[0]


def write_block(writer: GraphWriter, block: Block, stream: str) -> str:
    """All nodes of a block; [B, S, hidden] -> [B, S, hidden]."""
    flow = Flow(block, stream, stream)
    for step in block.steps:
        flow.value = WRITERS[type(step)](writer, flow, step)
    return flow.stream


def _norm(writer: GraphWriter, flow: Flow, step: Norm) -> str:
    if any(site.norm is step for site in flow.block.sites.values()):
        return flow.value  # written with the node behind it
    return writer.norm(step, flow.block.name(step.name), flow.value)


def _linears(writer: GraphWriter, flow: Flow, step: Linears) -> str:
    flow.linears, norm = step, flow.block.sites[step.node].norm
    norm_name = flow.block.name(norm.name) if norm else ""
    if step.floats:
        source = writer.norm(norm, norm_name, flow.value, flow.rows) if norm else flow.value
        return _products(writer, flow, step, source)
    return writer.gemm(flow.block.name(step.node), flow.value, norm, norm_name, flow.rows)


def _products(writer: GraphWriter, flow: Flow, step: Linears, source: str) -> str:
    """A MatMul of every linear that stays in floating point, side by side."""
    made, output = [], f"{flow.block.name(step.node)}.output"
    for member in step.members:
        name = flow.block.name(member.name)
        table = writer.node(
            "Transpose", [writer.tensor(f"{name}.weight")], f"{name}.transposed", perm=[1, 0]
        )
        whole = output if len(step.members) == 1 else f"{name}.output"
        product = f"{name}.product" if member.bias else whole
        writer.node("MatMul", [source, table], product)
        if member.bias:
            writer.node("Add", [product, writer.tensor(f"{name}.bias")], whole)
        made.append(whole)
    if len(made) > 1:
        writer.node("Concat", made, output, axis=-1)
    return writer.info(output, step.out_features, flow.rows)


def _reorder(writer: GraphWriter, flow: Flow, step: Reorder) -> str:
    name = flow.block.name(step.name)
    return writer.node("Gather", [flow.value, writer.tensor(name)], f"{name}.rows", axis=-1)


def _of_heads(writer: GraphWriter, flow: Flow, step: Step) -> str:
    flow.heads.append(step)
    return flow.value


def _attend(writer: GraphWriter, flow: Flow, step: Attend) -> str:
    heads, module, index = flow.block.heads, flow.module, flow.block.index
    query, key, value = _rotated_heads(writer, flow)
    form, context = writer.form(step.softcap is not None), f"{module}.context"
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "mask": writer.masks[step.window],
        "write_indices": WRITE_INDICES,
        "context": context,
        **{f"past_{part}": past(index, part) for part in form.parts},
        **{f"present_{part}": present(index, part) for part in form.parts},
    }
    limits = {"scale": float(step.scale), "softcap": float(step.softcap or 0)}
    writer.call(form, f"{module}.attention", tensors, **limits)
    return writer.info(context, heads.heads * heads.head_dim)


def _rotated_heads(writer: GraphWriter, flow: Flow) -> list[str]:
    """Names of queries, keys and values: one node cuts the heads, then norms and turns them; steps in
    another order follow it as nodes of their own.
    """
    cut, module, block = flow.block.heads, flow.module, flow.block
    form = RotatedHeads(heads=cut.heads, kv_heads=cut.kv_heads, head_dim=cut.head_dim)
    tensors, steps = {"qkv": flow.value}, flow.heads[1:]
    flow.heads = []
    if steps and isinstance(norms := steps[0], HeadNorm) and (kind := _normed_over(norms, cut)):
        form = replace(
            form, norm=kind, query_epsilon=norms.query.epsilon, key_epsilon=norms.key.epsilon
        )
        steps = steps[1:]
        for name, norm in (("query_gain", norms.query), ("key_gain", norms.key)):
            tensors[name] = writer.tensor(f"{block.name(norm.name)}.weight")
    if steps and isinstance(rope := steps[0], Rope):
        form, steps = replace(form, rotary=rope.width or cut.head_dim), steps[1:]
        tensors |= dict(zip(form.inputs[1:4], _positions(writer, rope), strict=True))
    made = [f"{module}.query", new_key(block.index)]
    names = [f"{name}.{len(steps)}" for name in made] if steps else made
    value = f"{module}.value"
    outputs = dict(zip(form.outputs, [*names, value], strict=True))
    writer.call(form, f"{module}.heads", tensors | outputs)
    for left, step in reversed([*enumerate(reversed(steps))]):
        targets = [f"{name}.{left}" for name in made] if left else made
        names = _apart(writer, flow, step, names, targets)
    return [*names, value]


def _normed_over(norms: HeadNorm, heads: Heads) -> int:
    """What a node's norm runs over; NO_NORM where queries and keys are not normed alike."""
    widths = norms.query.width, norms.key.width
    counts = heads.heads, heads.kv_heads
    if widths == (heads.head_dim, heads.head_dim):
        return EACH_HEAD
    return ALL_HEADS if widths == tuple(count * heads.head_dim for count in counts) else NO_NORM


def _positions(writer: GraphWriter, step: Rope) -> list[str]:
    """cos, sin, and the positions of the new tokens."""
    return [*writer.rope[step], writer.positions]


def _apart(
    writer: GraphWriter, flow: Flow, step: Step, sources: list[str], targets: list[str]
) -> list[str]:
    """A step on queries and keys [B, heads, S, head_dim], each by itself."""
    heads = flow.block.heads
    counts = heads.heads, heads.kv_heads
    for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if isinstance(step, HeadNorm):
            norm = (step.query, step.key)[place]
            _normed_heads(writer, flow, norm, source, target, counts[place])
        else:
            assert isinstance(step, Rope)
            turned = {} if step.width is None else {"rotary_embedding_dim": step.width}
            inputs = [source, *_positions(writer, step)]
            writer.node("RotaryEmbedding", inputs, target, interleaved=0, **turned)
    return targets


def _normed_heads(
    writer: GraphWriter, flow: Flow, norm: Norm, source: str, target: str, count: int
) -> None:
    """Norm of [B, count, S, head_dim] per head, or over all heads of a token together."""
    head_dim, turned = flow.block.heads.head_dim, {"perm": [0, 2, 1, 3]}
    form, tensors = RMSNorm(norm.epsilon), {"x": source, "y": target}
    tensors["gain"] = writer.tensor(f"{flow.block.name(norm.name)}.weight")
    if norm.width == head_dim:
        writer.call(form, f"{target}.norm", tensors)
        return
    rows = writer.node("Transpose", [source], f"{target}.rows", **turned)
    tensors |= {"x": writer.reshape(rows, [0, 0, norm.width], f"{target}.joined")}
    writer.call(form, f"{target}.norm", tensors | {"y": f"{target}.normed"})
    rows = writer.reshape(f"{target}.normed", [0, 0, count, head_dim], f"{target}.heads")
    writer.node("Transpose", [rows], target, **turned)


def _gate(writer: GraphWriter, flow: Flow, step: Gate) -> str:
    return _activated(writer, flow, Activation(step.activation, gated=1), "product")


def _activate(writer: GraphWriter, flow: Flow, step: Activate) -> str:
    return _activated(writer, flow, Activation(step.activation, gated=0), "activation")


def _activated(writer: GraphWriter, flow: Flow, form: Activation, name: str) -> str:
    assert flow.linears is not None
    output = f"{flow.module}.{name}"
    writer.call(form, output, {"x": flow.value, "y": output})
    return writer.info(output, flow.linears.out_features // (1 + form.gated), flow.rows)


def _experts(writer: GraphWriter, flow: Flow, step: Experts) -> str:
    """Rows of tokens, one for each expert that a token goes to, sorted by expert and cut there: each
    expert multiplies its own, and one without any multiplies none. What takes rows one by one, as
    the gate does, takes all at once.

    The place of a row is the number of rows of the experts before plus that of the same expert's
    before it. NonZero would sort them too, but TensorRT-RTX has no such op.
    """
    from onnx import TensorProto

    node, router = writer.node, flow.block.name(step.router.name)
    prefix, hidden = f"{router.rpartition('.')[0]}.experts", writer.quant.decoder.hidden
    zero, one = writer.constant("zero", 0), writer.constant("one", 1)
    chosen, weights = _routes(writer, flow, step, router)  # [B, S, top] each
    flat = writer.reshape(chosen, [1, -1], f"{prefix}.of_rows")  # [1, rows]
    numbers = writer.ints("experts", list(range(len(step.members))))
    numbers = node("Unsqueeze", [numbers, writer.ints("axes", [1])], f"{prefix}.numbers")
    taken = node("Equal", [flat, numbers], f"{prefix}.taken")  # [experts, rows]
    taken = node("Cast", [taken], f"{prefix}.taken_int64", to=TensorProto.INT64)
    counts = node("ReduceSum", [taken, writer.ints("axes", [1])], f"{prefix}.counts", keepdims=0)
    firsts = node("CumSum", [counts, zero], f"{prefix}.firsts", exclusive=1)
    firsts = node("Unsqueeze", [firsts, writer.ints("axes", [1])], f"{prefix}.first_of_each")
    before = node("CumSum", [taken, one], f"{prefix}.before", exclusive=1)
    places = node("Add", [before, firsts], f"{prefix}.place_in_each")
    places = node("Mul", [places, taken], f"{prefix}.place_where_taken")
    places = node("ReduceSum", [places, writer.ints("axes", [0])], f"{prefix}.places", keepdims=0)
    rows = node("Shape", [places], f"{prefix}.rows")
    # All rows at most, which TensorRT does not find out by itself.
    counts = node("Min", [counts, rows], f"{prefix}.bounded_counts")
    rows = node("Squeeze", [rows], f"{prefix}.rows_scalar")
    tokens = node("Range", [zero, rows, one], f"{prefix}.numbers_of_rows")
    tokens = node("Div", [tokens, writer.constant("top", step.top)], f"{prefix}.token_of_row")
    tokens = node("ScatterElements", [tokens, places, tokens], f"{prefix}.token_of_sorted", axis=0)
    values = writer.reshape(flow.value, [1, -1, hidden], f"{prefix}.tokens")
    inner = Flow(flow.block, "", node("Gather", [values, tokens], f"{prefix}.sorted", axis=1))
    # Some experts may have an order of channels in front of a node.
    members = ([one for one in member if not isinstance(one, Reorder)] for member in step.members)
    for steps in zip(*members, strict=True):
        if isinstance(steps[0], Linears):
            inner.value = _each_expert(writer, inner, prefix, counts, steps)
        else:  # the same of every expert
            inner.value = WRITERS[type(steps[0])](writer, inner, steps[0])
    made = node("Gather", [inner.value, places], f"{prefix}.by_row", axis=1)
    made = writer.reshape(made, [-1, step.top, hidden], f"{prefix}.by_token")
    made = writer.cast(made, TensorProto.FLOAT, f"{prefix}.by_token_float32")
    weights = writer.reshape(weights, [-1, step.top, 1], f"{prefix}.weights")
    made = node("Mul", [made, weights], f"{prefix}.weighted")
    made = node("ReduceSum", [made, writer.ints("axes", [1])], f"{prefix}.sum", keepdims=0)
    made = writer.cast(made, writer.dtype, f"{prefix}.sum_rounded")
    shape = node("Shape", [flow.value], f"{prefix}.shape")
    return node("Reshape", [made, shape], f"{prefix}.output")


def _routes(writer: GraphWriter, flow: Flow, step: Experts, router: str) -> tuple[str, str]:
    """The experts of each token and their weights, by scores in fp32: 16 bits would make ties."""
    from onnx import TensorProto, helper

    x = writer.cast(flow.value, TensorProto.FLOAT, f"{router}.input_float32")
    table = writer.tensor(flow.block.name(step.weight))
    table = writer.cast(table, TensorProto.FLOAT, f"{router}.weight_float32")
    table = writer.node("Transpose", [table], f"{router}.transposed", perm=[1, 0])
    scores = writer.node("MatMul", [x, table], f"{router}.output")
    writer.info(scores, len(step.members), dtype=TensorProto.FLOAT)
    best, chosen = f"{router}.best", f"{router}.chosen"
    top = writer.ints("top", [step.top])
    writer.nodes.append(helper.make_node("TopK", [scores, top], [best, chosen], name=chosen))
    if step.normalized:
        return chosen, writer.node("Softmax", [best], f"{router}.weights", axis=-1)
    total = writer.node("ReduceLogSumExp", [scores, writer.ints("axes", [-1])], f"{router}.total")
    below = writer.node("Sub", [best, total], f"{router}.log_weights")
    return chosen, writer.node("Exp", [below], f"{router}.weights")


def _each_expert(
    writer: GraphWriter, flow: Flow, prefix: str, counts: str, nodes: tuple[Linears, ...]
) -> str:
    """The nodes of all experts, each on its part of the rows."""
    from onnx import helper

    names = [flow.block.name(one.node) for one in nodes]
    inputs = [f"{name}.input" for name in names]
    writer.nodes.append(
        helper.make_node("Split", [flow.value, counts], inputs, name=f"{flow.value}.split", axis=1)
    )
    made = []
    for index, (one, source) in enumerate(zip(nodes, inputs, strict=True)):
        flow.value, flow.rows = source, (1, f"{prefix}.{index}.rows")
        writer.info(source, one.in_features, flow.rows)
        if order := flow.block.orders.get(one.node):
            flow.value = _reorder(writer, flow, order)
        made.append(_linears(writer, flow, one))
    flow.rows = (1, f"{prefix}.rows")
    flow.linears = replace(
        nodes[0],
        node=f"{prefix.removeprefix(f'{flow.block.prefix}.')}." + nodes[0].node.rpartition(".")[2],
    )
    return writer.node("Concat", made, f"{flow.block.name(flow.linears.node)}.output", axis=1)


def _add(writer: GraphWriter, flow: Flow, step: Add) -> str:
    flow.sums += 1
    number = "" if flow.sums == 1 else f"{flow.sums}"
    last = flow.sums == len(flow.block.branches)
    output = layer_output(flow.block.index) if last else flow.block.name(f"residual{number}")
    tensors = {"stream": flow.stream, "value": flow.value, "y": output}
    writer.call(ResidualSum(step.multiplier), output, tensors)
    flow.stream = writer.info(output, writer.quant.decoder.hidden)
    return flow.stream


WRITERS: dict[type, Callable[[GraphWriter, Flow, Any], str]] = {
    Norm: _norm,
    Linears: _linears,
    Reorder: _reorder,
    Heads: _of_heads,
    HeadNorm: _of_heads,
    Rope: _of_heads,
    Attend: _attend,
    Gate: _gate,
    Activate: _activate,
    Experts: _experts,
    Add: _add,
}
