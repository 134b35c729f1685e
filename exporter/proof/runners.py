"""Polygraphy runners for validation: any decoder session, and the torch reference in lockstep with
another runner.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from calibration.families.decoder import Site
from calibration.families.steps import Linears
from calibration.out.layout import MODEL_FILE
from exporter.graph.names import layer_output, new_key
from exporter.run.reference import TorchSession
from plugins.core.op_spec import is_custom
from plugins.errors import CheckError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from calibration.families import Decoder
    from calibration.reference.model import Computed, QuantReference
    from exporter.run.onnxruntime import OnnxSession
    from exporter.run.sessions import DecoderSession

__all__ = ["GemmNode", "LedRunner", "LockstepRunner", "ReplayRunner", "SessionRunner", "gemm_nodes"]

Feed = Mapping[str, np.ndarray]


class SessionRunner(BaseRunner):  # type: ignore[misc]
    """A decoder session as a Polygraphy runner.

    It takes input_ids [B, S] and attention_mask [B, P+S]; the cache stays in the session, and a
    mask no wider than the ids starts new sequences.

    Args:
        name: shown in results.
        make: opens the session when the runner is activated.
    """

    def __init__(self, name: str, make: Callable[[], DecoderSession]) -> None:
        super().__init__(name=name)
        self._make = make
        self.outputs: Feed = {}

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs."""
        return (
            TensorMetadata()
            .add("input_ids", np.int64, ("B", "S"))
            .add("attention_mask", np.int64, ("B", "T"))
        )

    def activate_impl(self) -> None:
        """Open the session."""
        self.session = self._make()

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """Run one call; the outputs are also kept in `outputs`."""
        began = time.monotonic()
        ids, mask = feed_dict["input_ids"], feed_dict["attention_mask"]
        if ids.shape == mask.shape:
            self.session.reset()
        self.outputs = self.session.step(ids, mask)
        self.inference_time = time.monotonic() - began
        return OrderedDict(self.outputs)

    def deactivate_impl(self) -> None:
        """Close the session."""
        self.session.close()
        self.outputs = {}
        del self.session


class LedRunner(SessionRunner):
    """A session that takes some inner tensors from another runner's last call, so that what it
    makes of them otherwise does not spread.

    Args:
        name, make: as SessionRunner's; the session has `lead`.
        leader: the other runner, which runs before.
    """

    def __init__(
        self, name: str, make: Callable[[], OnnxSession], leader: SessionRunner | ReplayRunner
    ) -> None:
        super().__init__(name, make)
        self._open, self._leader = make, leader

    def activate_impl(self) -> None:
        """Open the session."""
        self.session = self._led = self._open()

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """Run one call behind the leader's last one."""
        self._led.lead = self._leader.outputs
        return super().infer_impl(feed_dict)


@dataclass(frozen=True)
class GemmNode:
    """A custom node of the exported graph, or what is standard ops in the place of one: a router, or
    linears in floating point.

    Attributes:
        name: of the node, such as model.layers.0.self_attn.qkv_proj.
        source, result: the tensors it reads and writes.
        site: what the family declares of it.
        norm: full name of the norm between source and node that is part of the node, or "".
            That of standard ops is a node in front of them.
        router: whether it is one.
    """

    name: str
    source: str
    result: str
    site: Site
    norm: str = ""
    router: bool = False


def _routers(made: Mapping[str, onnx.NodeProto], decoder: Decoder) -> dict[str, GemmNode]:
    """{node of a layer's first expert: the layer's router, with the norm in front of both}."""
    found = {}
    for name, (block, experts) in decoder.routers.items():
        norm, result = block.branches[-1].norm, f"{name}.output"
        site = Site(Linears(name, (experts.router,)), () if norm is None else (norm,))
        first = block.name(block.branches[-1].sites[0].linears.node)
        own = "" if norm is None else block.name(norm.name)
        for tensor in (result, own or result):
            source = _read(made, tensor, "in front of the experts")
        found[first] = GemmNode(name, source, result, site, own, router=True)
    return found


def _products(made: Mapping[str, onnx.NodeProto], decoder: Decoder, name: str) -> GemmNode:
    """Linears in floating point, with the norm in front of them."""
    site = decoder.products[name]
    own = "" if site.norm is None else decoder.full_name(name, site.norm.name)
    table = f"{decoder.full_name(name, site.linears.names[0])}.transposed"
    products = (output for output, node in made.items() if table in node.input)
    source = _read(made, own or next(products, table), f"as part of {name}")
    return GemmNode(name, source, f"{name}.output", site, own)


def _read(made: Mapping[str, onnx.NodeProto], tensor: str, place: str) -> str:
    """What the node reads that makes a tensor.

    Raises:
        CheckError: there is none.
    """
    if tensor not in made:
        raise CheckError(
            MODEL_FILE,
            f"got no tensor {tensor}, expected it {place}",
            "The graph was changed after its export: export the model again",
        )
    return str(made[tensor].input[0])


def gemm_nodes(model: onnx.ModelProto, decoder: Decoder) -> list[GemmNode]:
    """The custom nodes of a graph in the decoder's execution order, and routers and linears in
    floating point between them.

    Raises:
        CheckError: one is missing, whose linear would run in no kernel of ours, so that nobody
            would compare it; or one reads the weight of another norm than the family's.
    """
    nodes = {node.name: node for node in model.graph.node if is_custom(node.domain)}
    made = {output: node for node in model.graph.node for output in node.output}
    found, routers = [], _routers(made, decoder)
    for name, site in decoder.products.items():
        if name in routers:
            found.append(routers[name])
        if site.linears.floats:
            found.append(_products(made, decoder, name))
            continue
        if name not in nodes:
            raise CheckError(
                MODEL_FILE,
                f"got {len(nodes)} custom nodes without {name}, expected {len(decoder.nodes)}: "
                f"{len(decoder.blocks[0].quantized)} in each of {decoder.layers} decoder layers"
                f"{' and the head' if decoder.head.quantized else ''}",
                "The graph was changed after its export (inlined functions?): export the "
                "model again",
            )
        node = nodes[name]
        fused = any(item.name == "norm_epsilon" and item.f > 0 for item in node.attribute)
        own = None if site.norm is None else decoder.full_name(name, site.norm.name)
        expected = "no norm" if own is None else f"{own}.weight"
        if fused and node.input[-1] != expected:
            raise CheckError(
                f"{MODEL_FILE}, node {name}",
                f"got {node.input[-1]} as the weight of its norm, expected {expected}",
                "The graph was changed after its export: export the model again",
            )
        norm = own if fused and own is not None else ""
        found.append(GemmNode(name, node.input[0], node.output[0], site, norm))
    return found


class ReplayRunner(BaseRunner):  # type: ignore[misc]
    """Gives recorded outputs, so that the runner that made them need not stay in memory.

    Args:
        name: of that runner.
        record: its outputs, call by call.
    """

    def __init__(self, name: str, record: Sequence[Feed]) -> None:
        super().__init__(name=name)
        self._record = record
        self.outputs: Feed = {}

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Nothing is read."""
        return TensorMetadata()

    def activate_impl(self) -> None:
        """Start at the first call."""
        self._calls = iter(self._record)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """The next call's outputs; also kept in `outputs`."""
        self.outputs = next(self._calls)
        self.inference_time = 0.0
        return OrderedDict(self.outputs)

    def deactivate_impl(self) -> None:
        """Let go of the last outputs."""
        self.outputs = {}


class LockstepRunner(BaseRunner):  # type: ignore[misc]
    """The torch reference held in step with another runner: every operator gets that runner's
    tensors as its input.

    Errors then do not add up, nor flip activation codes further on: what differs is made by the
    operator itself, so tolerances are a few roundings and the first bad operator is named exactly.

    Args:
        reference: the quantised model.
        leader: the runner to follow, run just before; its outputs must hold the layers' outputs,
            the nodes' tensors and, with a low-bit cache, the new keys.
        nodes: from gemm_nodes.
        routes: follow the scores of experts alone. What tells two experts apart may be less than
            rounding; a token that then goes another way is no error, but tells nothing either.

    Attributes:
        outputs: of the last call.
    """

    def __init__(
        self,
        name: str,
        reference: QuantReference,
        leader: SessionRunner | ReplayRunner,
        nodes: Sequence[GemmNode],
        routes: bool = False,
    ) -> None:
        super().__init__(name=name)
        self._leader = leader
        places = {("output", node.name): node.result for node in nodes if node.router}
        places |= {} if routes else _places(nodes, reference.decoder.layers)
        self._session = _LockstepSession(reference, places)
        self.outputs: Feed = {}

    def get_input_metadata_impl(self) -> TensorMetadata:
        """As SessionRunner's."""
        return SessionRunner.get_input_metadata_impl(self)

    def activate_impl(self) -> None:
        """Nothing to open."""

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """Run one call in step with the leader's last one."""
        began = time.monotonic()
        ids, mask = feed_dict["input_ids"], feed_dict["attention_mask"]
        if ids.shape == mask.shape:
            self._session.reset()
        self._session.lead(self._leader.outputs)
        outputs = self._session.step(ids, mask)
        self.inference_time = time.monotonic() - began
        self.outputs = {**self._session.seen, **outputs}
        return OrderedDict(self.outputs)

    def deactivate_impl(self) -> None:
        """Forget the cache."""
        self._session.reset()
        self.outputs = {}


def _places(nodes: Sequence[GemmNode], layers: int) -> dict[tuple[str, str], str]:
    """{place in the reference (see calibration.reference.model.Tap): the graph's tensor there}."""
    found: dict[tuple[str, str], str] = {}
    for node in nodes:
        found["output", node.name] = node.result
        found["norm" if node.norm else "input", node.norm or node.name] = node.source
    for index in range(layers):
        found["layer", str(index)] = layer_output(index)
        found["key", str(index)] = new_key(index)
    return found


class _LockstepSession(TorchSession):
    """Notes the tensors that come by in the reference and goes on with the leader's."""

    def __init__(self, reference: QuantReference, places: Mapping[tuple[str, str], str]) -> None:
        super().__init__(reference)
        self._quant, self._places = reference, places
        self.lead({})

    def lead(self, outputs: Feed) -> None:
        """Follow these outputs in the next step."""
        self._leader = outputs
        self._tensors: dict[str, Tensor] = {}
        self.seen: dict[str, np.ndarray] = {}

    def _compute(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Computed:
        made: Computed = self._quant(ids, mask, positions, self._cache, self._tap)
        return made

    def _tap(self, kind: str, name: str, value: Tensor) -> Tensor:
        import torch

        tensor = self._places.get((kind, name))
        if tensor is None or tensor not in self._leader:
            return value
        if tensor not in self.seen:
            self.seen[tensor] = value.numpy().copy()
        if tensor not in self._tensors:  # one object: linears that share an input quantise it once
            self._tensors[tensor] = torch.from_numpy(self._leader[tensor].astype(np.float32))
        return self._tensors[tensor]
