"""Writes a quantised checkpoint as an ONNX decoder, layer by layer: no tracing, no torch,
deterministic names and bytes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.checkpoints.safetensors import numpy_dtype
from calibration.out.layout import DATA_FILE, MODEL_FILE, ONNX
from calibration.progress import NullProgress, Progress
from calibration.quant.scheme import FLOAT_BITS
from exporter.graph.names import WRITE_INDICES, past, present
from exporter.graph.nodes import NodeFactory
from exporter.graph.steps import write_block
from exporter.graph.weights import ExternalWeights
from exporter.graph.writer import GraphWriter
from plugins.core.op_spec import is_custom
from plugins.errors import InputError

if TYPE_CHECKING:
    import onnx

    from calibration.families.steps import Rope
    from calibration.quant.folder import QuantModel

__all__ = [
    "IR_VERSION",
    "OPSET",
    "export_onnx",
]

# RMSNormalization, RotaryEmbedding and Attention are standard ops from here on; a static cache asks
# for the next one (plugins/cached_attention/body.py)
OPSET = 23
IR_VERSION = 11


def export_onnx(
    quant: QuantModel,
    folder: Path,
    progress: Progress | None = None,
    fuse_norms: bool = True,
    max_context: int | None = None,
    static: bool = False,
) -> dict[str, Any]:
    """Write MODEL_FILE and DATA_FILE into `folder`; the graph's tensors are documented in
    docs/onnx.md.

    Memory stays at one GEMM node's weights: each is packed, appended to the data file and
    forgotten.

    Args:
        fuse_norms: make the norms in front of GEMM nodes part of these nodes; else they are nodes
            of their own.
        max_context: most tokens of a sequence, which is how long the position tables are; None, and
            at most, is the context that the model was made for.
        static: the KV cache has that many tokens of capacity from the beginning, and new ones are
            written into it; else it grows by them.

    Returns:
        Facts for the manifest: "summary" and the number of custom nodes.

    Raises:
        InputError: the quantised folder holds codes or shapes an op refuses.
    """
    from onnx import TensorProto, helper

    progress = progress or NullProgress()
    decoder = quant.decoder
    _check_heads(quant)
    dtype = {
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
        "float32": TensorProto.FLOAT,
    }[quant.scheme.dtype]
    context = int(quant.config["max_position_embeddings"])
    longest = min(max_context or context, context)
    for step in decoder.ropes:
        if step.long(longest):
            progress.warning(
                f"{ONNX}: positions for {longest} tokens are those of longrope's long texts from the "
                f"first token on; transformers takes them beyond {step.short} tokens. --max-seq "
                f"{step.short} takes those of short texts."
            )
    progress.start(ONNX, decoder.layers + 1)
    with ExternalWeights(folder / DATA_FILE) as weights:
        writer = GraphWriter(
            quant=quant,
            weights=weights,
            factory=NodeFactory(dtype),
            dtype=dtype,
            fuse_norms=fuse_norms,
            static=static,
        )
        stream = _embedding(writer)
        if static:
            writer.positions, writer.masks = _static_masks(writer, longest)
        else:
            writer.masks = _attention_masks(writer)
        writer.rope = _rope_tables(writer, longest)
        for block in decoder.blocks:
            stream = write_block(writer, block, stream)
            progress.advance(note=stream)
        _head(writer, stream)
        inputs, outputs = _graph_values(writer, longest)
        graph = helper.make_graph(
            writer.nodes,
            "anybit_decoder",
            inputs,
            outputs,
            weights.initializers,
            value_info=writer.infos,
        )
        model = helper.make_model(
            graph,
            producer_name="anybit-trt",
            ir_version=IR_VERSION,
            functions=writer.factory.functions(),
            opset_imports=writer.factory.opset_imports(writer.factory.opset),
        )
        helper.set_model_props(
            model, {"anybit.scheme": quant.label, "anybit.method": quant.scheme.method}
        )
    (folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    progress.advance(note="written")
    progress.finish()
    custom = Counter(node.op_type for node in writer.nodes if is_custom(node.domain))
    ops = " and ".join(f"{count} {op}" for op, count in custom.items())
    return {"summary": f"{ops} nodes, opset {writer.factory.opset}", "custom_nodes": custom.total()}


def _check_heads(quant: QuantModel) -> None:
    """Eight codes of a low-bit cache share bytes."""
    for block in quant.decoder.blocks:
        if quant.scheme.kv_bits < FLOAT_BITS and block.heads.head_dim % 8:
            raise InputError(
                "--kv-bits",
                f"got heads of {block.heads.head_dim} numbers, expected a multiple of 8 for a cache "
                f"of {quant.scheme.kv_bits} bits",
                "Leave out --kv-bits",
            )


def _embedding(writer: GraphWriter) -> str:
    """The residual stream in front of the first block, [B, S, hidden]."""
    embedding = writer.quant.decoder.embedding
    table = writer.tensor(f"{embedding.name}.weight")
    rows = writer.node("Gather", [table, "input_ids"], embedding.name)
    return rows if embedding.scale is None else writer.scaled(rows, embedding.scale)


def _attention_masks(writer: GraphWriter) -> dict[int | None, str]:
    """Boolean [B, 1, S, T], true where a query may look, for each window that attention has;
    T = P + S.

    A query always sees itself: a padding row would otherwise be all masked, give NaN, and spoil
    the cache.
    """
    from onnx import TensorProto

    node = writer.node
    node("Shape", ["attention_mask"], "mask.total", start=1, end=2)
    node("Shape", ["input_ids"], "mask.new", start=1, end=2)
    zero, one = writer.scalar("mask.zero", 0), writer.scalar("mask.one", 1)
    total = node("Squeeze", ["mask.total"], "mask.total_scalar")
    past_tokens = node(
        "Sub", [total, node("Squeeze", ["mask.new"], "mask.new_scalar")], "mask.past"
    )
    keys = node("Range", [zero, total, one], "mask.keys")
    queries = node("Range", [past_tokens, total, one], "mask.queries")
    column = node("Unsqueeze", [queries, writer.ints("axes", [1])], "mask.query_column")
    causal = node("LessOrEqual", [keys, column], "mask.causal")
    itself = node("Equal", [keys, column], "mask.itself")
    valid = node("Cast", ["attention_mask"], "mask.valid", to=TensorProto.BOOL)
    valid = node("Unsqueeze", [valid, writer.ints("axes", [1, 2])], "mask.valid_4d")
    allowed = node("And", [causal, valid], "mask.allowed")
    masks: dict[int | None, str] = {}
    for window in dict.fromkeys(block.attend.window for block in writer.quant.decoder.blocks):
        name, seen = "mask", allowed
        if window is not None:
            name, near = f"mask.window{window}", _near(writer, keys, column, window)
            seen = node("And", [allowed, near], f"{name}.allowed")
        masks[window] = node("Or", [seen, itself], name)
    return masks


def _static_masks(writer: GraphWriter, capacity: int) -> tuple[str, dict[int | None, str]]:
    """Positions of the new tokens [B, S], and boolean [B, 1, S, capacity], true where a query may
    look, for each window; a sequence begins at the cache's first row, so that a token's position is
    its row.
    """
    node, zero, one = writer.node, writer.scalar("mask.zero", 0), writer.scalar("mask.one", 1)
    node("Shape", ["input_ids"], "mask.new", start=1, end=2)
    new = node("Squeeze", ["mask.new"], "mask.new_scalar")
    steps = node("Range", [zero, new, one], "positions.steps")
    first = node("Unsqueeze", [WRITE_INDICES, writer.ints("axes", [1])], "positions.first")
    positions = node("Add", [first, steps], "positions")
    keys = node("Range", [zero, writer.scalar("mask.capacity", capacity), one], "mask.keys")
    queries = node("Unsqueeze", [positions, writer.ints("axes", [1, 3])], "mask.query_column")
    masks: dict[int | None, str] = {}
    windows = dict.fromkeys(block.attend.window for block in writer.quant.decoder.blocks)
    causal = node("LessOrEqual", [keys, queries], "mask")
    for window in windows:
        masks[window] = causal
        if window is not None:
            near = _near(writer, keys, queries, window)
            masks[window] = node("And", [causal, near], f"mask.window{window}")
    return positions, masks


def _near(writer: GraphWriter, keys: str, queries: str, window: int) -> str:
    """Where a key is one of the last `window` before a query, itself included."""
    name = f"mask.window{window}"
    before = writer.scalar(f"{name}.before", window - 1)
    first = writer.node("Sub", [queries, before], f"{name}.first")
    return writer.node("GreaterOrEqual", [keys, first], f"{name}.near")


def _rope_tables(writer: GraphWriter, longest: int) -> dict[Rope, tuple[str, str]]:
    """cos and sin, [longest, rotated channels / 2], for each way in which blocks rotate."""
    import numpy as np

    quant, tables = writer.quant, {}
    dtype = numpy_dtype(quant.scheme.dtype)
    positions = np.arange(longest, dtype=np.float32)
    for step in quant.decoder.ropes:
        inv_freq, scaling = quant.rope(step, longest)
        angles = (positions[:, None] * inv_freq[None, :]).astype(np.float64)
        prefix = f"rope.{step.table}" if step.table else "rope"
        cos, sin = (
            writer.weights.add(
                f"{prefix}.{name}", (table * scaling).astype(np.float32).astype(dtype)
            )
            for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles)))
        )
        tables[step] = cos, sin
    return tables


def _head(writer: GraphWriter, stream: str) -> str:
    """Final norm and the fp32 logits of the wanted tokens; a tied head reads the embedding's own
    initializer.
    """
    from onnx import TensorProto

    decoder = writer.quant.decoder
    head = decoder.head
    table = f"{decoder.head_table()}.weight"
    if not (head.tied or head.quantized):
        writer.tensor(table)
    rows = _wanted(writer, stream, f"{head.name}.rows")
    if head.quantized:
        scores = writer.gemm(head.name, rows, head.norm, head.norm.name, ("B", "L"))
    else:
        normed = writer.norm(head.norm, head.norm.name, rows, ("B", "L"))
        table = writer.node("Transpose", [table], f"{head.name}.transposed", perm=[1, 0])
        scores = writer.node("MatMul", [normed, table], head.name)
    if head.softcap is None:
        return writer.node("Cast", [scores], "logits", to=TensorProto.FLOAT)
    scores = writer.cast(scores, TensorProto.FLOAT, f"{head.name}.float32")
    return writer.capped(scores, 1.0, head.softcap, head.name, "logits")


def _wanted(writer: GraphWriter, stream: str, output: str) -> str:
    """The rows that logits are wanted of, [B, S, hidden] -> [B, L, hidden]."""
    places = writer.node(
        "Unsqueeze", ["logits_indices", writer.ints("axes", [2])], "logits_indices.places"
    )
    return writer.node("GatherND", [stream, places], output, batch_dims=1)


def _graph_values(
    writer: GraphWriter, longest: int
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Graph inputs and outputs, in the documented order."""
    from onnx import TensorProto, helper

    decoder, info = writer.quant.decoder, helper.make_tensor_value_info
    before, after = (longest, longest) if writer.static else ("P", "T")

    def caches(name: Any, length: str | int) -> list[onnx.ValueInfoProto]:
        found, form = [], writer.form()
        for block in decoder.blocks:
            for part in form.parts:
                dtype, width = form.row(part, block.heads.head_dim, writer.dtype)
                shape = ["B", block.heads.kv_heads, length, width]
                found.append(info(name(block.index, part), dtype, shape))
        return found

    places = (
        [info(WRITE_INDICES, TensorProto.INT64, ["B"])]
        if writer.static
        else [
            info("attention_mask", TensorProto.INT64, ["B", "T"]),
            info("position_ids", TensorProto.INT64, ["B", "S"]),
        ]
    )
    inputs = [
        info("input_ids", TensorProto.INT64, ["B", "S"]),
        *places,
        info("logits_indices", TensorProto.INT64, ["B", "L"]),
        *caches(past, before),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["B", "L", decoder.vocab]),
        *caches(present, after),
    ]
    return inputs, outputs
