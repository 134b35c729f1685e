"""Polygraphy runners for validation: any decoder session, and the torch reference in lockstep with
another runner.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from calibration.out.layout import MODEL_FILE
from exporter.graph.decoder import layer_output, new_key
from exporter.run.reference import TorchSession
from plugins.core.op_spec import is_custom
from plugins.errors import CheckError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from calibration.families import ModelFamily
    from exporter.run.sessions import DecoderSession

__all__ = ["GemmNode", "LockstepRunner", "ReplayRunner", "SessionRunner", "gemm_nodes"]

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


@dataclass(frozen=True)
class GemmNode:
    """A custom node of the exported graph.

    Attributes:
        name: of the node, such as model.layers.0.self_attn.qkv_proj.
        source, result: the tensors it reads and writes.
        members: module names of its linears in the torch reference, in the order of its output.
        norm: module name of the norm between source and them that is part of the node, or "".
    """

    name: str
    source: str
    result: str
    members: tuple[str, ...]
    norm: str = ""


def gemm_nodes(model: onnx.ModelProto, family: ModelFamily, layers: int) -> list[GemmNode]:
    """The custom nodes of a graph in the family's execution order.

    Raises:
        CheckError: one is missing, whose linear would run in no kernel of ours, so that nobody
            would compare it; or one reads the weight of another norm than the family's.
    """
    nodes = {node.name: node for node in model.graph.node if is_custom(node.domain)}
    found = []
    for prefix in map(family.layer, range(layers)):
        for group in family.groups:
            name = f"{prefix}.{group.node}"
            if name not in nodes:
                raise CheckError(
                    MODEL_FILE,
                    f"got {len(nodes)} custom nodes without {name}, expected "
                    f"{len(family.groups) * layers}: "
                    f"{len(family.groups)} in each of {layers} decoder layers",
                    "The graph was changed after its export (inlined functions?): export the model again",
                )
            members = tuple(f"{prefix}.{member.name}" for member in group.members)
            node = nodes[name]
            fused = any(item.name == "norm_epsilon" and item.f > 0 for item in node.attribute)
            norm = f"{prefix}.{group.norm}" if fused else ""
            expected = f"{norm}.weight" if group.norm else "no norm"
            if fused and node.input[-1] != expected:
                raise CheckError(
                    f"{MODEL_FILE}, node {name}",
                    f"got {node.input[-1]} as the weight of its norm, expected {expected}",
                    "The graph was changed after its export: export the model again",
                )
            found.append(GemmNode(name, node.input[0], node.output[0], members, norm))
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


class LockstepRunner(SessionRunner):
    """The torch reference held in step with another runner: every operator gets that runner's
    tensors as its input.

    Errors then do not add up, nor flip activation codes further on: what differs is made by the
    operator itself, so tolerances are a few roundings and the first bad operator is named exactly.

    Args:
        make: opens the torch session.
        leader: the runner to follow, run just before; its outputs must hold the layers' outputs,
            the nodes' tensors and, with a low-bit cache, the new keys.
        nodes: from gemm_nodes.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], TorchSession],
        leader: SessionRunner | ReplayRunner,
        nodes: Sequence[GemmNode],
    ) -> None:
        super().__init__(name, make)
        self._leader, self._nodes = leader, nodes

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """Run one call in step with the leader's last one."""
        with self._in_step() as seen:
            outputs = super().infer_impl(feed_dict)
        return OrderedDict({**seen, **outputs})

    @contextmanager
    def _in_step(self) -> Iterator[dict[str, np.ndarray]]:
        assert isinstance(self.session, TorchSession)
        model = self.session.model
        swap = _Swap(self._leader.outputs)
        followers = [*model.model.layers[1:], model.model.norm]
        hooks = [
            module.register_forward_pre_hook(swap.input(layer_output(index)))
            for index, module in enumerate(followers)
        ]
        for index, layer in enumerate(model.model.layers):
            if hasattr(layer.self_attn, "cache_quantizer"):
                hooks.append(
                    layer.self_attn.cache_quantizer.register_forward_pre_hook(
                        swap.input(new_key(index))
                    )
                )
        for node in self._nodes:
            modules = [model.get_submodule(member) for member in node.members]
            ends = np.cumsum([module.weight.shape[0] for module in modules])
            for module in [model.get_submodule(node.norm)] if node.norm else modules:
                hooks.append(module.register_forward_pre_hook(swap.input(node.source)))
            for module, end in zip(modules, ends, strict=True):
                columns = slice(int(end) - module.weight.shape[0], int(end))
                hooks.append(module.register_forward_hook(swap.output(node.result, columns)))
        try:
            yield swap.seen
        finally:
            for hook in hooks:
                hook.remove()


class _Swap:
    """Hooks that note the tensor that comes by and hand on the leader's instead."""

    def __init__(self, leader: Feed) -> None:
        self._leader = leader
        self._tensors: dict[str, Tensor] = {}
        self.seen: dict[str, np.ndarray] = {}

    def _tensor(self, name: str) -> Tensor:
        import torch

        if (
            name not in self._tensors
        ):  # one object per name: linears that share an input quantise it once
            self._tensors[name] = torch.from_numpy(self._leader[name].astype(np.float32))
        return self._tensors[name]

    def input(self, name: str) -> Any:
        """A pre-hook; what comes by is the reference for the leader's tensor of this name."""

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            if name not in self.seen:
                self.seen[name] = arguments[0].numpy().copy()
            return self._tensor(name), *arguments[1:]

        return hook

    def output(self, name: str, columns: slice) -> Any:
        """A hook on a linear that makes these columns of the leader's tensor."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            whole = self._tensor(name)
            self.seen.setdefault(name, np.zeros(whole.shape, np.float32))[..., columns] = (
                output.numpy()
            )
            return whole[..., columns].contiguous()

        return hook
