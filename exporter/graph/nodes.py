"""Makes the nodes that have a local function of standard ops, the custom GEMMs and those that are
inlined, and collects the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plugins import op_spec
from plugins.core.op_spec import DOMAIN, PLUGIN_VERSION, GemmAttributes

if TYPE_CHECKING:
    import onnx

    from plugins.core.function import FunctionForm

__all__ = ["NodeFactory"]

Variant = tuple[str, int, int, int, int, bool, int, bool, int]


class NodeFactory:
    """One model's custom nodes; nodes of one scheme share a function, whatever their sizes.

    The first function of an op is in the domain "anybit", the next ones in "anybit.v1",
    "anybit.v2", ... in order of first use. Overload names are made for this, but ONNX Runtime 1.23
    takes the last function of them all, and onnx-graphsurgeon drops them.

    Args:
        dtype: type of X and Y, onnx.TensorProto.FLOAT16, BFLOAT16 or FLOAT.
    """

    def __init__(self, dtype: int) -> None:
        self._dtype = dtype
        self._functions: dict[Variant, onnx.FunctionProto] = {}
        self._inlined: dict[str, FunctionForm] = {}  # by op

    def gemm(
        self, op: str, attrs: GemmAttributes, name: str, inputs: list[str], output: str
    ) -> onnx.NodeProto:
        """A node of the custom op `op`.

        Args:
            op: a name of the plugins registry.
            attrs: its sizes and scheme, checked here.
            name: of the node.
            inputs: tensors in the order of the op's input_names().
            output: tensor it writes.
        """
        from onnx import helper

        spec = op_spec(op)
        spec.check(attrs, name)
        formal = spec.input_names(attrs)
        if len(inputs) != len(formal):
            raise ValueError(f"{name}: got {len(inputs)} inputs, {op} takes {', '.join(formal)}")
        function = self._function(op, attrs)
        return helper.make_node(
            op,
            inputs,
            [output],
            name=name,
            domain=function.domain,
            plugin_namespace=DOMAIN,
            plugin_version=PLUGIN_VERSION,
            **attrs.as_dict(),
        )

    def call(
        self,
        form: FunctionForm,
        name: str,
        inputs: list[str],
        outputs: list[str],
        **attributes: float,
    ) -> list[onnx.NodeProto]:
        """A node that runtimes inline, or run natively. Of an op's second form in a model the nodes of
        its body: TensorRT's parser knows a function by its name alone, and would take the first.

        Args:
            form: of its function.
            inputs, outputs: in the order of the form's.
            attributes: of this node, besides the form's.
        """
        from onnx import helper

        attributes = {**form.attributes, **attributes}
        if self._inlined.setdefault(form.op, form) != form:
            return _unfolded(form.function(self._dtype), name, inputs, outputs, attributes)
        domain = form.domain
        return [helper.make_node(form.op, inputs, outputs, name=name, domain=domain, **attributes)]

    def functions(self) -> list[onnx.FunctionProto]:
        """The functions of the nodes made so far: the custom ones in order of first use, then those
        that are inlined; all of the newest opset that one of them asks for, since a model has one.
        """
        inlined = (form.function(self._dtype) for form in self._inlined.values())
        found = [*self._functions.values(), *inlined]
        for function in found:
            function.opset_import[0].version = self.opset
        return found

    @property
    def opset(self) -> int:
        """Of the model's standard ops."""
        from plugins.core.onnx_body import OPSET

        return max([OPSET, *(form.opset for form in self._inlined.values())])

    def opset_imports(self, opset: int) -> list[onnx.OperatorSetIdProto]:
        """What a model of these nodes and standard ones of this opset imports."""
        from onnx import helper

        domains = dict.fromkeys([DOMAIN, *(function.domain for function in self.functions())])
        return [
            helper.make_opsetid("", opset),
            *(helper.make_opsetid(domain, 1) for domain in domains),
        ]

    def _function(self, op: str, attrs: GemmAttributes) -> onnx.FunctionProto:
        variant = (
            op,
            attrs.wbits,
            attrs.levels,
            attrs.abits,
            attrs.act_symmetric,
            attrs.group_size > 0,
            attrs.has_bias,
            attrs.has_norm,
            attrs.has_minimum,
        )
        if variant not in self._functions:
            number = sum(other[0] == op for other in self._functions)
            self._functions[variant] = op_spec(op).function_body(
                attrs, self._dtype, f"{DOMAIN}.v{number}" if number else DOMAIN
            )
        return self._functions[variant]


def _unfolded(
    function: onnx.FunctionProto,
    name: str,
    inputs: list[str],
    outputs: list[str],
    attributes: Mapping[str, Any],
) -> list[onnx.NodeProto]:
    """The nodes of a function in the place of a call of it; inner names get the call's in front."""
    import onnx

    names = {"": ""} | dict(zip(function.input, inputs, strict=True))
    names |= dict(zip(function.output, outputs, strict=True))
    made = []
    for index, node in enumerate(function.node):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{name}.{node.op_type}_{index}"
        for values in (copy.input, copy.output):
            values[:] = [names.get(value, f"{name}.{value}") for value in values]
        for attribute in copy.attribute:
            if attribute.ref_attr_name:
                given = attributes[attribute.ref_attr_name]
                attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, given))
        made.append(copy)
    return made
