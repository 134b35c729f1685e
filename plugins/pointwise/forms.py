"""ResidualSum, Activation, RMSNorm and RotatedHeads in standard ONNX ops.

A form is what the nodes that share a function have in common, its sizes and numbers included; the
nodes' attributes say the same to the native kernel. Every standard op's result is rounded once, but
for those between casts to fp32 and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from onnx import TensorProto, helper

from plugins.core.onnx_body import OPSET, NodeBuilder
from plugins.pointwise import DOMAIN

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ACTIVATIONS",
    "ALL_HEADS",
    "EACH_HEAD",
    "NO_NORM",
    "Activation",
    "RMSNorm",
    "ResidualSum",
    "RotatedHeads",
]

NO_NORM, EACH_HEAD, ALL_HEADS = range(3)  # HeadNormKind of cpu/pointwise.h


class _Form(ABC):
    """What the forms here share: a subclass adds its fields and `op`."""

    domain: ClassVar[str] = DOMAIN
    opset: ClassVar[int] = OPSET
    op: ClassVar[str]

    @property
    @abstractmethod
    def inputs(self) -> list[str]:
        """Names of the function's inputs."""

    @property
    def outputs(self) -> list[str]:
        """Names of the function's outputs."""
        return ["y"]

    @property
    def attributes(self) -> dict[str, Any]:
        """All of the form."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @abstractmethod
    def body(self, body: NodeBuilder) -> None:
        """Write the nodes."""

    def function(self, dtype: int) -> onnx.FunctionProto:
        """The local function.

        Args:
            dtype: onnx.TensorProto type of the inputs and outputs that are floats.
        """
        builder = NodeBuilder(dtype)
        self.body(builder)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_function(
            DOMAIN, self.op, self.inputs, self.outputs, builder.nodes, imports, [*self.attributes]
        )


@dataclass(frozen=True)
class ResidualSum(_Form):
    """y = stream + multiplier * value, all [..., width]; a product is rounded before it is added.

    Attributes:
        multiplier: multiplied in fp32.
    """

    multiplier: float = 1.0
    op: ClassVar[str] = "ResidualSum"

    @property
    def inputs(self) -> list[str]:
        """The residual stream, and what is added to it."""
        return ["stream", "value"]

    def body(self, body: NodeBuilder) -> None:
        """Write the nodes."""
        value = "value"
        if self.multiplier != 1:
            factor = body.const(self.multiplier, np.float32)
            value = body.node("Mul", body.float32(value), factor)
            if body.dtype != TensorProto.FLOAT:
                value = body.cast(value, body.dtype)
        body.node("Add", "stream", value, output="y")


@dataclass(frozen=True)
class Activation(_Form):
    """y = activation(x), or, gated, the activation of the first half of x's last axis times the other.

    Attributes:
        activation: a value of calibration.families.steps.ACTIVATIONS.
        gated: 1 or 0.
    """

    activation: str
    gated: int
    op: ClassVar[str] = "Activation"

    @property
    def inputs(self) -> list[str]:
        """[..., width], or gated [..., 2 width]."""
        return ["x"]

    def body(self, body: NodeBuilder) -> None:
        """Write the nodes."""
        if not self.gated:
            ACTIVATIONS[self.activation](body, "x", "y")
            return
        body.nodes.append(helper.make_node("Split", ["x"], ["gate", "up"], axis=-1, num_outputs=2))
        body.node("Mul", ACTIVATIONS[self.activation](body, "gate", ""), "up", output="y")


def _silu(body: NodeBuilder, x: str, output: str) -> str:
    return body.node("Mul", x, body.node("Sigmoid", x), output=output)


def _gelu_tanh(body: NodeBuilder, x: str, output: str) -> str:
    return body.node("Gelu", x, output=output, approximate="tanh")


def _relu2(body: NodeBuilder, x: str, output: str) -> str:
    positive = body.node("Relu", x)
    return body.node("Mul", positive, positive, output=output)


# As cpu/pointwise.h lists them.
ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "relu2": _relu2}


@dataclass(frozen=True)
class RMSNorm(_Form):
    """RMSNorm of x [..., width] over its last axis, times gain [width].

    Attributes:
        epsilon: under the root.
    """

    epsilon: float
    op: ClassVar[str] = "RMSNorm"

    @property
    def inputs(self) -> list[str]:
        """What is normed, and the gain."""
        return ["x", "gain"]

    def body(self, body: NodeBuilder) -> None:
        """Write the nodes."""
        _norm(body, "x", "gain", self.epsilon, "y")


def _norm(body: NodeBuilder, x: str, gain: str, epsilon: float, output: str = "") -> str:
    return body.node("RMSNormalization", x, gain, output=output, axis=-1, epsilon=epsilon)


@dataclass(frozen=True, kw_only=True)
class RotatedHeads(_Form):
    """Queries [B, heads, S, D], keys and values [B, kv_heads, S, D] of qkv [B, S, (heads + 2 kv_heads) D];
    queries and keys first normed, if there is a norm, then turned by their positions, if any channels
    are.

    Attributes:
        heads, kv_heads, head_dim: counts, and D.
        rotary: channels of a head that turn, the first ones; 0 is none.
        norm: NO_NORM, EACH_HEAD by itself, or ALL_HEADS of a token together.
        query_epsilon, key_epsilon: of the norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int = 0
    norm: int = NO_NORM
    query_epsilon: float = 0.0
    key_epsilon: float = 0.0
    op: ClassVar[str] = "RotatedHeads"

    @property
    def inputs(self) -> list[str]:
        """cos and sin are [positions, rotary / 2], position_ids int64 [B, S]; a gain is [D], or of all
        heads of a token.
        """
        tables = ["cos", "sin", "position_ids"] if self.rotary else []
        return ["qkv", *tables, *(["query_gain", "key_gain"] if self.norm else [])]

    @property
    def outputs(self) -> list[str]:
        """Names of the function's outputs."""
        return ["query", "key", "value"]

    def body(self, body: NodeBuilder) -> None:
        """Write the nodes."""
        counts = [self.heads, self.kv_heads]
        shape = body.ints(0, 0, sum(counts) + self.kv_heads, self.head_dim)
        all_heads = body.node("Transpose", body.node("Reshape", "qkv", shape), perm=[0, 2, 1, 3])
        if not (self.norm or self.rotary):
            _split(body, all_heads, [*counts, self.kv_heads], self.outputs)
            return
        _split(body, all_heads, [sum(counts), self.kv_heads], ["both", "value"])
        both = "both"
        if self.norm:
            _split(body, both, counts, ["query_heads", "key_heads"])
            query = self._normed(body, "query", self.heads, self.query_epsilon)
            key = self._normed(body, "key", self.kv_heads, self.key_epsilon)
            if not self.rotary:
                return
            both = body.node("Concat", query, key, axis=1)
        partly: dict[str, Any] = (
            {} if self.rotary == self.head_dim else {"rotary_embedding_dim": self.rotary}
        )
        turned = body.node(
            "RotaryEmbedding", both, "cos", "sin", "position_ids", interleaved=0, **partly
        )
        _split(body, turned, counts, self.outputs[:2])

    def _normed(self, body: NodeBuilder, kind: str, count: int, epsilon: float) -> str:
        """Norm of [B, count, S, D]; the last one, without positions, is an output."""
        rows, gain = f"{kind}_heads", f"{kind}_gain"
        output = "" if self.rotary else kind
        if self.norm == EACH_HEAD:
            return _norm(body, rows, gain, epsilon, output)
        rows = body.node("Transpose", rows, perm=[0, 2, 1, 3])
        rows = body.node("Reshape", rows, body.ints(0, 0, count * self.head_dim))
        rows = _norm(body, rows, gain, epsilon)
        rows = body.node("Reshape", rows, body.ints(0, 0, count, self.head_dim))
        return body.node("Transpose", rows, output=output, perm=[0, 2, 1, 3])


def _split(body: NodeBuilder, source: str, sizes: list[int], outputs: list[str]) -> None:
    """Heads of [B, heads, S, D]."""
    body.nodes.append(helper.make_node("Split", [source, body.ints(*sizes)], outputs, axis=1))
