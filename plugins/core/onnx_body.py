"""Builds the bodies of custom ops from standard ONNX ops, so that one file runs in stock ONNX
Runtime on any CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from plugins.core.activation import TINY
from plugins.core.op_spec import GemmAttributes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CODE_OFFSET", "OPSET", "BodyBuilder", "NodeBuilder"]

OPSET = 23
# int8 codes travel as uint8 with this zero point: uint8 x uint8 is exact in every MatMulInteger
# kernel
CODE_OFFSET = 128
_LARGEST = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.3895313892515355e38}


class NodeBuilder:
    """Collects the nodes of one function; every method returns the name of the tensor it made.

    Args:
        dtype: onnx.TensorProto type of the function's floats.
        prefix: of the tensor names; a subgraph needs one of its own.
    """

    def __init__(self, dtype: int, prefix: str = "t") -> None:
        self.dtype = dtype
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node with one output."""
        output = output or f"{self._prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def const(self, values: Any, dtype: Any) -> str:
        """A constant tensor; equal ones are shared."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.node("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.const(values, np.int64)

    def cast(self, source: str, to: int) -> str:
        """Cast to an onnx.TensorProto type."""
        return self.node("Cast", source, to=to)

    def join(self, *parts: str) -> str:
        """Concatenate int64 vectors into a shape."""
        return self.node("Concat", *parts, axis=0)

    def beside(self, parts: Sequence[str], axis: int) -> str:
        """Tensors joined along an axis; "" if there are none."""
        return self.node("Concat", *parts, axis=axis) if len(parts) > 1 else "".join(parts)

    def first(self, x: str, count: str, axis: int) -> str:
        """The first `count` (int64 [1]) entries of x along an axis."""
        return self.node("Slice", x, self.ints(0), count, self.ints(axis))

    def reshape(self, x: str, *sizes: int | str) -> str:
        """x [sizes], from numbers and int64 [1] tensors; -1 stands for what is left, 0 for an empty
        axis.
        """
        shape = self.join(*(self.ints(size) if isinstance(size, int) else size for size in sizes))
        return self.node("Reshape", x, shape, allowzero=int(-1 not in sizes))

    def float32(self, x: str) -> str:
        """x of the function's type as fp32."""
        return x if self.dtype == TensorProto.FLOAT else self.cast(x, TensorProto.FLOAT)

    def saturated(self, y: str) -> str:
        """fp32 y in the function's type; a finite overflow becomes the largest number."""
        if self.dtype not in _LARGEST:
            return y
        largest = _LARGEST[self.dtype]
        return self.cast(
            self.node("Clip", y, self.const(-largest, np.float32), self.const(largest, np.float32)),
            self.dtype,
        )

    def steps(self, x: str, bits: int, symmetric: bool) -> tuple[str, str, str]:
        """plugins.core.activation.quantize_activation, all but the sum with the zero point, in as
        few passes over [M, K] as it takes.

        Args:
            x: fp32 [M, K].

        Returns:
            round(x / scale) fp32 [M, K], scale fp32 [M, 1], zero fp32 [M, 1] or "" if symmetric.
        """
        extent, low = self._extent(x, symmetric)
        high = (1 << (bits - 1)) - 1
        steps = high if symmetric else 2 * high + 1
        scale = self.node(
            "Div",
            self.node("Max", extent, self.const(TINY, np.float32)),
            self.const(steps, np.float32),
        )
        scale = self.node(
            "Add", scale, self.node("Sub", extent, extent)
        )  # NaN where the row has inf, or its range is inf
        loud = self._per_token(
            "ReduceSum", self.node("Mul", x, self.const(0, np.float32))
        )  # ReduceMax may lose a NaN
        scale = self.node("Add", scale, loud)
        # The Reshape keeps ONNX Runtime from fusing (1 / scale) * x into x / scale, which rounds
        # some codes differently.
        reciprocal = self.reshape(self.node("Div", self.const(1, np.float32), scale), -1, 1)
        scaled = self.node("Mul", x, reciprocal)
        # Not QuantizeLinear, though it is faster by half a ms for 2048 x 576: ONNX Runtime 1.23 has
        # none at this opset. A NaN may become any code, since its row's scale is NaN. |x / scale|
        # exceeds its number of steps by rounding only, so that nothing else clamps but the sum with
        # a zero point: both can round up, to one code too many.
        rounded = self.node("Round", scaled)
        if symmetric:
            return rounded, scale, ""
        limits = self.const(-high - 1, np.float32), self.const(high, np.float32)
        zero = self.node("Round", self.node("Mul", self.node("Neg", low), reciprocal))
        return rounded, scale, self.node("Clip", self.node("Add", zero, limits[0]), *limits)

    def fake_quantized(self, x: str, bits: int) -> str:
        """x fp32 [M, K] as its asymmetric codes stand for it: (code - zero) * scale."""
        rounded, scale, zero = self.steps(x, bits, False)
        highest = self.node("Sub", self.const((1 << (bits - 1)) - 1, np.float32), zero)
        return self.node("Mul", self.node("Min", rounded, highest), scale)

    def _extent(self, x: str, symmetric: bool) -> tuple[str, str]:
        """Of each row of x: the range that the codes cover, and for asymmetric ones min(x, 0)."""
        if symmetric:
            return self._per_token("ReduceMax", self.node("Abs", x)), ""
        nothing = self.const(0, np.float32)
        low = self.node("Min", self._per_token("ReduceMin", x), nothing)
        return self.node(
            "Sub", self.node("Max", self._per_token("ReduceMax", x), nothing), low
        ), low

    def _per_token(self, op: str, x: str) -> str:
        """A reduction of [M, K] to [M, 1]; the Reshape is for M = 0, which ONNX Runtime reduces to
        [0, K].
        """
        return self.reshape(self.node(op, x, self.ints(-1)), -1, 1)


class BodyBuilder(NodeBuilder):
    """The function of a GEMM op.

    Sizes are read from the calling node's attributes: one function serves every layer of a scheme.

    Args:
        attrs: the scheme; its sizes and epsilon are not used, but for whether there are groups and
            a norm.
        dtype: onnx.TensorProto type of X and Y.
        prefix: see NodeBuilder.
    """

    def __init__(self, attrs: GemmAttributes, dtype: int, prefix: str = "t") -> None:
        super().__init__(dtype, prefix)
        self.attrs = attrs
        self._features: dict[str, str] = {}

    def feature(self, attribute: str) -> str:
        """An integer attribute of the calling node, int64 [1]."""
        if attribute not in self._features:
            scalar = self.node("Constant")
            value = onnx.AttributeProto(
                name="value_int", ref_attr_name=attribute, type=onnx.AttributeProto.INT
            )
            self.nodes[-1].attribute.append(value)
            self._features[attribute] = self.node("Reshape", scalar, self.ints(1))
        return self._features[attribute]

    def unpacked_bytes(self, words: str) -> str:
        """INT32 words [R, C] as uint8 [4, R, C]: bits 8i..8i+7 in slice i."""
        words = self.node("Unsqueeze", self.cast(words, TensorProto.UINT32), self.ints(0))
        shifts = self.const(np.array([0, 8, 16, 24]).reshape(4, 1, 1), np.uint32)
        parts = self.node("BitShift", words, shifts, direction="RIGHT")
        return self.cast(
            self.node("BitwiseAnd", parts, self.const(255, np.uint32)), TensorProto.UINT8
        )

    def rows(self) -> str:
        """X, or its norm, as fp32 [M, K]."""
        x = self.normed() if self.attrs.has_norm else "X"
        return self.reshape(self.float32(x), -1, self.feature("in_features"))

    def normed(self) -> str:
        """plugins.core.activation.rms_norm of X, of the function's type.

        In fp64, because ONNX Runtime casts around a 16-bit norm and then drops its rounding, and
        because fp32 results differ between libraries. ONNX Runtime computes stage one of an fp64
        norm in fp64, whatever stash_type says (the standard's default is fp32), and casts fp64 to
        16 bits by way of fp32, as rms_norm does.
        """
        y = self.node(
            "RMSNormalization",
            self.cast("X", TensorProto.DOUBLE),
            self.cast("gamma", TensorProto.DOUBLE),
            axis=-1,
        )
        epsilon = onnx.AttributeProto(
            name="epsilon", ref_attr_name="norm_epsilon", type=onnx.AttributeProto.FLOAT
        )
        self.nodes[-1].attribute.append(epsilon)
        return self.cast(y, self.dtype)

    def quantize(self) -> tuple[str, str, str]:
        """plugins.core.activation.quantize_activation of X.

        Returns:
            codes + CODE_OFFSET uint8 [M, K], scale fp32 [M, 1], zero fp32 [M, 1] or "" if
            symmetric.
        """
        rounded, scale, zero = self.steps(
            self.rows(), self.attrs.abits, bool(self.attrs.act_symmetric)
        )
        offset = self.const(CODE_OFFSET, np.float32)
        if not zero:
            return self.cast(self.node("Add", rounded, offset), TensorProto.UINT8), scale, ""
        codes = self.node("Add", rounded, self.node("Add", zero, offset))
        codes = self.node(
            "Min", codes, self.const(CODE_OFFSET + (1 << (self.attrs.abits - 1)) - 1, np.float32)
        )
        return self.cast(codes, TensorProto.UINT8), scale, zero

    def finish(self, y: str) -> None:
        """Add the bias, saturate and cast to Y's type, restore X's leading dimensions."""
        if self.attrs.has_bias:
            y = self.node("Add", y, "bias")
        y = self.saturated(y)
        shape = self.join(self.node("Shape", "X", start=0, end=-1), self.feature("out_features"))
        self.node("Reshape", y, shape, output="Y", allowzero=1)

    def function(self, name: str, inputs: Sequence[str], domain: str) -> onnx.FunctionProto:
        """The finished function."""
        return helper.make_function(
            domain,
            name,
            list(inputs),
            ["Y"],
            self.nodes,
            [helper.make_opsetid("", OPSET)],
            [*self.attrs.as_dict(), "plugin_namespace", "plugin_version"],
        )
