"""Cuts a graph into pieces of some decoder layers, and runs calls through them one piece after the
other, so that memory and the time of a build stay those of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from exporter.graph.names import layer_of, layer_output
from exporter.run.forms import CacheForm, cache_bits, cache_form, with_numbers
from exporter.run.onnxruntime import (
    inference_session,
    load_model,
    own_of,
    take_from_outside,
)
from exporter.run.rounding import round_every_op
from exporter.run.sessions import DecoderSession, cache_names

if TYPE_CHECKING:
    import onnx

__all__ = [
    "FoldedSession",
    "OnnxPiece",
    "Piece",
    "PieceRunner",
    "PieceSession",
    "cut",
    "pieces",
    "run_pieces",
]

Arrays = dict[str, np.ndarray]


class PieceRunner(Protocol):
    """What runs a piece."""

    def infer(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The piece's outputs by their names, of its inputs; bfloat16 comes and goes as fp32."""


@dataclass(frozen=True)
class Piece:
    """Some decoder layers of a graph, as a graph of its own.

    Attributes:
        first, end: the layers, `end` left out; layer 0 has the embedding, and the one behind the last
            is the head.
        model: the graph. Its inputs are the whole graph's as far as they are read, and the residual
            stream in front of it; its outputs are the whole graph's of these layers and the inner
            tensors that were asked for.
        stream: name of the residual stream that it reads, or "".
        result: name of the one that it gives, or "logits"; an output too.
        form: of the whole graph's cache.
        bits: of that cache.
        given: inner tensors that it reads, from outside; what its nodes make of them is an output.
    """

    first: int
    end: int
    model: onnx.ModelProto
    stream: str
    result: str
    form: CacheForm
    bits: int
    given: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """Names of what it reads."""
        return [value.name for value in self.model.graph.input]


def pieces(
    model: onnx.ModelProto, layers: int, marked: Sequence[str], most: int, judged: range
) -> list[Piece]:
    """A graph in pieces.

    Args:
        model: of OUT/onnx, without its weights.
        layers: decoder layers in it; the head counts as one more.
        marked: inner tensors that become outputs of their pieces.
        most: bytes of weights in a piece, which has at least one layer.
        judged: the layers that are wanted.
    """
    bounds, taken = [judged.start], 0
    for index, size in enumerate(_layer_bytes(model, layers)):
        if index in judged and index > bounds[-1] and taken + size > most:
            bounds.append(index)
            taken = 0
        taken += size if index in judged else 0
    return [
        cut(model, first, end, layers, marked) for first, end in pairwise([*bounds, judged.stop])
    ]


def _layer_bytes(model: onnx.ModelProto, layers: int) -> list[int]:
    """Bytes of weights by decoder layer, then of the head; the embedding counts for it too."""
    found = [0] * (layers + 1)
    for tensor in model.graph.initializer:
        length = next((int(one.value) for one in tensor.external_data if one.key == "length"), 0)
        layer = layer_of(tensor.name)
        found[layers if layer is None else layer] += length
    return found


def cut(
    model: onnx.ModelProto,
    first: int,
    end: int,
    layers: int,
    marked: Sequence[str],
    given: Sequence[str] = (),
) -> Piece:
    """Decoder layers `first` to `end` - 1 of a graph, with those of `marked` that lie in them as
    outputs, and those of `given` as inputs; layer `layers` is the head.
    """
    import onnx

    graph = model.graph
    stream = layer_output(first - 1) if first else ""
    result = layer_output(end - 1) if end <= layers else "logits"
    makers = {name: node for node in graph.node for name in node.output if name}

    def mine(name: str) -> bool:
        layer = layer_of(name)
        return (layers if layer is None else layer) in range(first, end)

    ends = [value.name for value in graph.output if mine(value.name)]
    wanted = dict.fromkeys([*ends, *filter(mine, marked), result])
    read, nodes, pending = set[str](), set[str](), list(wanted)
    while pending:
        name = pending.pop()
        if name in read:
            continue
        read.add(name)
        if name != stream and name in makers:
            nodes.add(makers[name].output[0])
            pending += [one for one in makers[name].input if one]
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    inputs = [value for value in graph.input if value.name in read]
    info, float_type = (
        onnx.helper.make_tensor_value_info,
        known[layer_output(0)].type.tensor_type.elem_type,
    )
    cut_graph = onnx.helper.make_graph(
        [node for node in graph.node if node.output[0] in nodes],
        f"layers_{first}_{end}",
        [*inputs, *([known[stream]] if stream else [])],
        [known.get(name) or info(name, float_type, None) for name in wanted],
        [tensor for tensor in graph.initializer if tensor.name in read],
        value_info=[value for value in graph.value_info if value.name in read - {stream}],
    )
    inner = [name for name in given if mine(name) and name in read and name != stream]
    take_from_outside(cut_graph, inner)
    used = {(node.domain, node.op_type) for node in cut_graph.node}
    made = onnx.helper.make_model(
        cut_graph,
        ir_version=model.ir_version,
        opset_imports=model.opset_import,
        functions=[one for one in model.functions if (one.domain, one.name) in used],
    )
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    form, bits = cache_form(shapes), cache_bits(graph)
    return Piece(first, end, made, stream, result, form, bits, tuple(inner))


class PieceSession(DecoderSession):
    """A piece as a session, whose step() returns its outputs; the cache stays in it.

    Args:
        piece: what it is.
        runner: what runs it.
        max_context: most tokens a sequence may have.
        dtype: of the model's floats.

    Attributes:
        stream: the residual stream that the next step reads, [B, S, hidden]; not of the first piece.
        lead: the tensors that are given to the next step, by their names.
    """

    def __init__(self, piece: Piece, runner: PieceRunner, max_context: int, dtype: str) -> None:
        super().__init__(max_context, dtype=dtype)
        self._piece, self._runner = piece, runner
        self.stream: np.ndarray | None = None
        self.lead: Mapping[str, np.ndarray] = {}
        self._names = cache_names(piece.inputs)
        inputs = {value.name: value.type.tensor_type for value in piece.model.graph.input}
        self._past = {name: inputs[f"past_key_values.{name}"] for name in self._names}
        self._clear()

    def _clear(self) -> None:
        self._cache: Arrays = {}

    def _forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> Arrays:
        form = self._piece.form
        cache = self._cache or self._empty_cache(len(input_ids))
        feeds = form.feeds(input_ids, attention_mask, positions, wanted)
        feeds |= {f"past_key_values.{name}": cache[name] for name in self._names}
        if self._piece.stream:
            assert self.stream is not None
            feeds[self._piece.stream] = form.arranged(self.stream, attention_mask)
        for name in self._piece.given:
            feeds[name] = form.led(name, self.lead[name], attention_mask)
        outputs = self._runner.infer({name: feeds[name] for name in self._piece.inputs})
        outputs |= {name: outputs.pop(own_of(name)) for name in self._piece.given}
        self._cache = {name: outputs[f"present.{name}"] for name in self._names}
        return with_numbers(form.restored(outputs, attention_mask), self._piece.bits, self.dtype)

    def _empty_cache(self, batch: int) -> Arrays:
        from onnx import TensorProto

        types = {TensorProto.FLOAT16: np.float16, TensorProto.INT8: np.int8}
        sizes = {
            name: [dim.dim_value for dim in past.shape.dim] for name, past in self._past.items()
        }
        rows = self._piece.form.rows()
        return {
            name: np.zeros(
                (batch, heads, rows, width), types.get(self._past[name].elem_type, np.float32)
            )
            for name, (_, heads, _, width) in sizes.items()
        }

    def close(self) -> None:
        """Let go of the cache; the runner is its owner's."""
        self._clear()


class OnnxPiece:
    """A piece in ONNX Runtime on the CPU, with every rounding in its place.

    Args:
        piece: what is run.
        folder: where its weights are.
        kernels: a custom-op library that runs the custom nodes; None: their bodies do.

    Raises:
        InputError: ONNX Runtime refuses the piece or the library.
    """

    def __init__(self, piece: Piece, folder: Path, kernels: Path | None = None) -> None:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(piece.model)
        round_every_op(model)
        self._names = [value.name for value in piece.model.graph.output]
        self._session = inference_session(model.SerializeToString(), folder, kernels)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """See PieceRunner."""
        return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))


def run_pieces(
    found: Iterable[Piece],
    calls: Sequence[tuple[np.ndarray, np.ndarray]],
    open_piece: Callable[[Piece], AbstractContextManager[PieceSession]],
    record: Sequence[Mapping[str, np.ndarray]],
    led: bool = False,
) -> list[Arrays]:
    """What the pieces give at each call, all together: every call goes through a piece before the
    next one is opened.

    Args:
        found: the pieces, in their order.
        calls: (input_ids [B, S], attention_mask [B, P + S]); a mask no wider than the ids starts new
            sequences.
        open_piece: a session of a piece, for a with statement.
        record: at each call, the residual stream that the first piece reads, by its name, and what else
            is given.
        led: every piece reads the residual stream of the record.
    """
    outputs: list[Arrays] = [{} for _ in calls]
    for piece in found:
        with open_piece(piece) as session:
            for (ids, mask), given, seen in zip(calls, record, outputs, strict=True):
                if ids.shape == mask.shape:
                    session.reset()
                made = given if led or piece.stream not in seen else seen
                session.stream, session.lead = made.get(piece.stream), given
                seen |= session.step(ids, mask)
    return outputs


class FoldedSession(DecoderSession):
    """The graph in ONNX Runtime by function bodies, one decoder layer after the other, so that the
    weights of one are unpacked at a time.

    Args:
        folder: OUT/onnx.
        max_context: most tokens a sequence may have.
        marked: inner tensors that step() returns besides the model's outputs.
        dtype: of the model's floats.
        layers: decoder layers.
    """

    def __init__(
        self, folder: Path, max_context: int, marked: Sequence[str], dtype: str, layers: int
    ) -> None:
        super().__init__(max_context, dtype=dtype)
        found = pieces(load_model(folder), layers, marked, 0, range(layers + 1))
        self._parts = [
            (piece, PieceSession(piece, _Once(piece, folder), max_context, dtype))
            for piece in found
        ]

    def _clear(self) -> None:
        for _, part in self._parts:
            part.reset()

    def _forward(self, *arguments: np.ndarray) -> Arrays:
        outputs: Arrays = {}
        for piece, part in self._parts:
            part.stream = outputs.get(piece.stream)
            outputs |= part._forward(*arguments)
        return outputs

    def close(self) -> None:
        """Let go of the cache."""
        self._clear()


class _Once:
    """A piece in ONNX Runtime that is open while it runs."""

    def __init__(self, piece: Piece, folder: Path) -> None:
        self._piece, self._folder = piece, folder

    def infer(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """See PieceRunner."""
        return OnnxPiece(self._piece, self._folder).infer(feeds)
