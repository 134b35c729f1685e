"""Collects the nodes and initializers of a decoder's graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from plugins import op_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from calibration.families.steps import Norm, Rope
    from calibration.quant.folder import QuantModel
    from exporter.graph.nodes import NodeFactory
    from exporter.graph.weights import ExternalWeights
    from plugins.cached_attention.body import AttentionForm
    from plugins.core.function import FunctionForm

__all__ = ["GraphWriter"]


@dataclass(kw_only=True)
class GraphWriter:
    """Appends nodes and initializers; every method returns the name of the tensor it made.

    Attributes:
        quant: the folder whose tensors go into the graph.
        weights: the initializers.
        factory: of the nodes that are functions.
        dtype: of the model's floats, onnx.TensorProto.FLOAT16, BFLOAT16 or FLOAT.
        fuse_norms: norms in front of GEMM nodes become part of them.
        nodes, infos: the graph's, so far.
        masks: boolean [B, 1, S, T] by attention's window.
        positions: of the new tokens, int64 [B, S].
        rope: tables of cos and sin, by the step that turns by them.
        static: the KV cache has a fixed capacity, and new tokens are written into it.
    """

    quant: QuantModel
    weights: ExternalWeights
    factory: NodeFactory
    dtype: int
    fuse_norms: bool = True
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    infos: list[onnx.ValueInfoProto] = field(default_factory=list)
    masks: dict[int | None, str] = field(default_factory=dict)
    positions: str = "position_ids"
    rope: dict[Rope, tuple[str, str]] = field(default_factory=dict)
    static: bool = False

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A standard node named after its single output."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def split(self, source: str, sizes: list[int], axis: int, outputs: list[str]) -> list[str]:
        """Split `source` along `axis` into pieces of the given sizes."""
        from onnx import helper

        self.nodes.append(
            helper.make_node(
                "Split",
                [source, self.ints("split", sizes)],
                outputs,
                name=f"{source}.split",
                axis=axis,
            )
        )
        return outputs

    def reshape(self, source: str, sizes: list[int], output: str) -> str:
        """Reshape to a shape where 0 stands for the same axis of `source`, and -1 for what is left."""
        return self.node("Reshape", [source, self.ints("shape", sizes)], output)

    def cast(self, source: str, to: int, output: str) -> str:
        """`source`, of the model's type or fp32, in one of these types; no node where they are one."""
        from onnx import TensorProto

        if self.dtype == TensorProto.FLOAT:
            return source
        return self.node("Cast", [source], output, to=to)

    def scaled(self, source: str, factor: float) -> str:
        """`source` times a number of the model's type; no node where the number is 1."""
        if factor == 1:
            return source
        return self.node("Mul", [source, self.number(factor, self.dtype)], f"{source}.scaled")

    def capped(self, source: str, scale: float, cap: float, prefix: str, output: str) -> str:
        """cap tanh(scale source / cap) of an fp32 tensor."""
        from onnx import TensorProto

        ratio, limit = (self.number(value, TensorProto.FLOAT) for value in (scale / cap, cap))
        inner = self.node("Mul", [source, ratio], f"{prefix}.scaled")
        return self.node("Mul", [self.node("Tanh", [inner], f"{prefix}.tanh"), limit], output)

    def ints(self, prefix: str, values: list[int]) -> str:
        """A shared int64 constant vector."""
        import numpy as np

        name = f"{prefix}.{'_'.join(str(value) for value in values)}"
        if name not in self.weights:
            self.weights.add_inline(name, np.array(values, np.int64))
        return name

    def scalar(self, name: str, value: int) -> str:
        """An int64 scalar constant."""
        import numpy as np

        return self.weights.add_inline(name, np.array(value, np.int64))

    def constant(self, prefix: str, value: int) -> str:
        """A shared int64 scalar constant."""
        name = f"{prefix}.scalar_{value}"
        return name if name in self.weights else self.scalar(name, value)

    def number(self, value: float, dtype: int) -> str:
        """A shared float scalar constant of an onnx.TensorProto type."""
        import numpy as np
        from onnx import TensorProto, helper

        name = f"number.{TensorProto.DataType.Name(dtype).lower()}.{value!r}"
        if name not in self.weights:
            self.weights.add_inline(name, np.array(value, helper.tensor_dtype_to_np_dtype(dtype)))
        return name

    def tensor(self, name: str) -> str:
        """A float tensor of the quantised folder, under its own name."""
        return self.weights.add(name, self.quant.tensor(name))

    def info(
        self,
        name: str,
        width: int,
        rows: tuple[str | int, str] = ("B", "S"),
        dtype: int | None = None,
    ) -> str:
        """Declare the shape of a tensor [*rows, width] of a type, or the model's."""
        from onnx import helper

        kind = self.dtype if dtype is None else dtype
        self.infos.append(helper.make_tensor_value_info(name, kind, [*rows, width]))
        return name

    def norm(
        self, norm: Norm, name: str, source: str, rows: tuple[str | int, str] = ("B", "S")
    ) -> str:
        """RMSNorm of [*rows, width] over the last axis, named `name` as the tensor of its gain is
        (without ".weight").
        """
        from plugins.pointwise.forms import RMSNorm

        gain = self.tensor(f"{name}.weight")
        self.call(RMSNorm(norm.epsilon), name, {"x": source, "gain": gain, "y": name})
        return self.info(name, norm.width, rows)

    def gemm(
        self,
        name: str,
        source: str,
        norm: Norm | None,
        norm_name: str,
        rows: tuple[str | int, str] = ("B", "S"),
    ) -> str:
        """The custom node `name` of linears stacked along the output, with the norm in front of it:
        [*rows, K] -> [*rows, N].
        """
        linear = self.quant.fused(self.quant.decoder.members(name), name)
        spec, attrs = op_spec(linear.scheme.op), linear.attributes
        packed = spec.pack(linear.arrays, attrs, name)
        names = [
            self.weights.add(f"{name}.{key}", packed[key]) for key in spec.input_names(attrs)[1:]
        ]
        if norm and self.fuse_norms and norm.epsilon:  # a node takes an epsilon of 0 for no norm
            attrs = replace(attrs, norm_epsilon=norm.epsilon)
            names.append(self.tensor(f"{norm_name}.weight"))  # gamma is the last input
        elif norm:
            source = self.norm(norm, norm_name, source, rows)
        output = f"{name}.output"
        self.nodes.append(self.factory.gemm(spec.name, attrs, name, [source, *names], output))
        return self.info(output, attrs.out_features, rows)

    def call(
        self, form: FunctionForm, name: str, tensors: Mapping[str, str], **attributes: float
    ) -> None:
        """A node that runtimes inline, or run natively.

        Args:
            form: of its function.
            tensors: inputs and outputs, by their names there; more are left out.
            attributes: of this node, besides the form's.
        """
        inputs, outputs = ([tensors[one] for one in names] for names in (form.inputs, form.outputs))
        self.nodes += self.factory.call(form, name, inputs, outputs, **attributes)

    def form(self, capped: bool = False) -> AttentionForm:
        """Of the model's attention."""
        from plugins.cached_attention.body import AttentionForm

        return AttentionForm(static=self.static, capped=capped, bits=self.quant.scheme.kv_bits)
