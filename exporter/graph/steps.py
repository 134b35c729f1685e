"""What each step of a decoder block is in ONNX; calibration/reference/steps.py says the same in
torch.

Where these nodes round to the model's type is part of what they say: every standard node's result
is rounded once, but for the nodes between casts to fp32 and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calibration.families.decoder import Block
from calibration.families.steps import (
    Activate,
    Add,
    Attend,
    Gate,
    HeadNorm,
    Heads,
    Linears,
    Norm,
    Reorder,
    Rope,
)
from exporter.graph.names import WRITE_INDICES, layer_output, new_key, past, present
from exporter.graph.writer import GraphWriter

__all__ = ["WRITERS", "Flow", "write_block"]


@dataclass
class Flow:
    """What runs through the steps of a block, as names of tensors.

    Attributes:
        block: the block.
        stream: the residual stream, [B, S, hidden].
        value: what the last step made. Behind Heads the queries and keys of all heads,
            [B, heads + kv_heads, S, head_dim].
        values: the other part of what Heads made, [B, kv_heads, S, head_dim].
        linears: the GEMM node last written.
        sums: Adds so far.
    """

    block: Block
    stream: str
    value: str
    values: str = ""
    linears: Linears | None = None
    sums: int = 0

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
    return writer.info(flow.stream, writer.quant.decoder.hidden)


def _norm(writer: GraphWriter, flow: Flow, step: Norm) -> str:
    if any(site.norm is step for site in flow.block.sites.values()):
        return flow.value  # written with the node behind it
    return writer.norm(step, flow.block.name(step.name), flow.value)


def _linears(writer: GraphWriter, flow: Flow, step: Linears) -> str:
    flow.linears, norm = step, flow.block.sites[step.node].norm
    norm_name = flow.block.name(norm.name) if norm else ""
    return writer.gemm(flow.block.name(step.node), flow.value, norm, norm_name)


def _reorder(writer: GraphWriter, flow: Flow, step: Reorder) -> str:
    name = flow.block.name(step.name)
    return writer.node("Gather", [flow.value, writer.tensor(name)], f"{name}.rows", axis=-1)


def _heads(writer: GraphWriter, flow: Flow, step: Heads) -> str:
    rows = writer.reshape(
        flow.value,
        [0, 0, step.heads + 2 * step.kv_heads, step.head_dim],
        f"{flow.module}.qkv_heads",
    )
    heads = writer.node("Transpose", [rows], f"{flow.module}.qkv", perm=[0, 2, 1, 3])
    both, flow.values = writer.split(
        heads,
        [step.heads + step.kv_heads, step.kv_heads],
        1,
        [f"{flow.module}.qk", f"{flow.module}.value"],
    )
    return both


def _head_norm(writer: GraphWriter, flow: Flow, step: HeadNorm) -> str:
    counts = [flow.block.heads.heads, flow.block.heads.kv_heads]
    parts = writer.split(
        flow.value, counts, 1, [f"{flow.module}.query_heads", f"{flow.module}.key_heads"]
    )
    normed = [
        _normed_heads(writer, flow, norm, part, count)
        for norm, part, count in zip((step.query, step.key), parts, counts, strict=True)
    ]
    return writer.node("Concat", normed, f"{flow.module}.qk_normed", axis=1)


def _normed_heads(writer: GraphWriter, flow: Flow, norm: Norm, part: str, count: int) -> str:
    """Norm of [B, count, S, head_dim] per head, or over all heads of a token together."""
    name, head_dim = flow.block.name(norm.name), flow.block.heads.head_dim
    if norm.width == head_dim:
        return writer.norm(norm, name, part)
    turned = {"perm": [0, 2, 1, 3]}
    rows = writer.node("Transpose", [part], f"{part}.rows", **turned)
    rows = writer.norm(norm, name, writer.reshape(rows, [0, 0, norm.width], f"{part}.joined"))
    rows = writer.reshape(rows, [0, 0, count, head_dim], f"{name}.rows")
    return writer.node("Transpose", [rows], f"{name}.heads", **turned)


def _rope(writer: GraphWriter, flow: Flow, step: Rope) -> str:
    return writer.node(
        "RotaryEmbedding",
        [flow.value, *writer.rope[step], writer.positions],
        f"{flow.module}.qk_rotated",
        interleaved=0,
        **({} if step.width is None else {"rotary_embedding_dim": step.width}),
    )


def _attend(writer: GraphWriter, flow: Flow, step: Attend) -> str:
    heads, module, index = flow.block.heads, flow.module, flow.block.index
    query, key = writer.split(
        flow.value, [heads.heads, heads.kv_heads], 1, [f"{module}.query", new_key(index)]
    )
    parts, context = writer.form().parts, f"{module}.context"
    tensors = {
        "query": query,
        "key": key,
        "value": flow.values,
        "mask": writer.masks[step.window],
        "write_indices": WRITE_INDICES,
        "context": context,
        **{f"past_{part}": past(index, part) for part in parts},
        **{f"present_{part}": present(index, part) for part in parts},
    }
    writer.attention(f"{module}.attention", tensors, step.scale, step.softcap)
    return writer.info(context, heads.heads * heads.head_dim)


def _gate(writer: GraphWriter, flow: Flow, step: Gate) -> str:
    assert flow.linears is not None
    width = flow.linears.out_features // 2
    gate, up = writer.split(
        flow.value, [width, width], -1, [f"{flow.module}.gate", f"{flow.module}.up"]
    )
    gate = ACTIVATIONS[step.activation](writer, gate, flow.module)
    return writer.node("Mul", [gate, up], f"{flow.module}.product")


def _activate(writer: GraphWriter, flow: Flow, step: Activate) -> str:
    return ACTIVATIONS[step.activation](writer, flow.value, flow.module)


def _add(writer: GraphWriter, flow: Flow, step: Add) -> str:
    from onnx import TensorProto

    flow.sums += 1
    number = "" if flow.sums == 1 else f"{flow.sums}"
    last = flow.sums == len(flow.block.branches)
    output = layer_output(flow.block.index) if last else flow.block.name(f"residual{number}")
    value = writer.scaled(flow.value, step.multiplier, TensorProto.FLOAT)
    flow.stream = writer.node("Add", [flow.stream, value], output)
    return flow.stream


def _silu(writer: GraphWriter, x: str, module: str) -> str:
    return writer.node(
        "Mul", [x, writer.node("Sigmoid", [x], f"{module}.sigmoid")], f"{module}.silu"
    )


def _gelu_tanh(writer: GraphWriter, x: str, module: str) -> str:
    return writer.node("Gelu", [x], f"{module}.gelu", approximate="tanh")


def _relu2(writer: GraphWriter, x: str, module: str) -> str:
    positive = writer.node("Relu", [x], f"{module}.relu")
    return writer.node("Mul", [positive, positive], f"{module}.relu2")


ACTIVATIONS: dict[str, Callable[[GraphWriter, str, str], str]] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
}

WRITERS: dict[type, Callable[[GraphWriter, Flow, Any], str]] = {
    Norm: _norm,
    Linears: _linears,
    Reorder: _reorder,
    Heads: _heads,
    HeadNorm: _head_norm,
    Rope: _rope,
    Attend: _attend,
    Gate: _gate,
    Activate: _activate,
    Add: _add,
}
