"""Pointwise nodes in ONNX Runtime: native kernels give the bits of the function bodies, each of whose
ops rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from exporter.graph.nodes import NodeFactory
from exporter.run.rounding import round_every_op
from plugins.core.function import FunctionForm, is_inlined
from plugins.pointwise.forms import (
    ALL_HEADS,
    EACH_HEAD,
    Activation,
    ResidualSum,
    RMSNorm,
    RotatedHeads,
)
from plugins.tools.build import build_onnxruntime
from tests.exporter.node_cases import ELEMENT
from tests.plugins.kernel_cases import BF16, F16, F32

TOKENS, WIDTH, POSITIONS = 7, 96, 20
HEADS = {"heads": 4, "kv_heads": 1, "head_dim": 16}
FORMS: list[FunctionForm] = [
    ResidualSum(),
    ResidualSum(0.22),
    *(Activation(kind, gated) for kind in ("silu", "gelu_tanh", "relu2") for gated in (0, 1)),
    RMSNorm(1e-5),
    RMSNorm(0.0),
    RotatedHeads(**HEADS),
    RotatedHeads(**HEADS, rotary=16),
    RotatedHeads(**HEADS, rotary=6),
    RotatedHeads(**HEADS, rotary=16, norm=EACH_HEAD, query_epsilon=1e-5, key_epsilon=1e-6),
    RotatedHeads(**HEADS, norm=EACH_HEAD, query_epsilon=1e-5, key_epsilon=1e-6),
    RotatedHeads(**HEADS, rotary=8, norm=ALL_HEADS, query_epsilon=1e-6, key_epsilon=1e-5),
    RotatedHeads(**HEADS, norm=ALL_HEADS, query_epsilon=1e-6, key_epsilon=1e-5),
]


def inputs_of(form: FunctionForm, loud: float = 1.0) -> dict[str, np.ndarray]:
    """Of one call, in fp32; the first row of each is times `loud`."""
    shape = [TOKENS, WIDTH]
    sizes = {"gain": [WIDTH], "cos": [POSITIONS, 0], "sin": [POSITIONS, 0]}
    if isinstance(form, RotatedHeads):
        sizes["cos"][1] = sizes["sin"][1] = form.rotary // 2
        gains = (4, 1) if form.norm == ALL_HEADS else (1, 1)
        sizes |= {
            name: [count * 16]
            for name, count in zip(("query_gain", "key_gain"), gains, strict=True)
        }
    rng = np.random.default_rng(3)
    found = {
        name: rng.normal(0, 2, sizes.get(name, [2, *shape])).astype(np.float32)
        for name in form.inputs
    }
    if "position_ids" in found:
        found["position_ids"] = rng.integers(0, POSITIONS, (2, TOKENS))
    with np.errstate(invalid="ignore"):
        for name, array in found.items():
            if name not in sizes and name != "position_ids":
                array[0, 0] *= np.float32(loud)
    return found


def model_of(form: FunctionForm, dtype: np.dtype[Any]) -> onnx.ModelProto:
    """fp32 inputs -> cast to dtype -> the node -> its outputs cast to fp32."""
    kind, factory, info = ELEMENT[dtype], NodeFactory(ELEMENT[dtype]), helper.make_tensor_value_info
    floats = [name for name in form.inputs if name != "position_ids"]
    nodes = [helper.make_node("Cast", [f"{name}32"], [name], to=kind) for name in floats]
    nodes += factory.call(form, "node", form.inputs, form.outputs)
    nodes += [
        helper.make_node("Cast", [name], [f"{name}32"], to=TensorProto.FLOAT)
        for name in form.outputs
    ]
    arrays = inputs_of(form)
    inputs = [
        info(f"{name}32", TensorProto.FLOAT, arrays[name].shape)
        if name in floats
        else info(name, TensorProto.INT64, arrays[name].shape)
        for name in form.inputs
    ]
    outputs = [info(f"{name}32", TensorProto.FLOAT, None) for name in form.outputs]
    known = [info("model.layers.0.output", kind, ["B", "S", 1])]  # says the model's type
    graph = helper.make_graph(nodes, "pointwise", inputs, outputs, value_info=known)
    model = helper.make_model(
        graph, ir_version=11, functions=factory.functions(), opset_imports=factory.opset_imports(23)
    )
    return model


def session_of(model: onnx.ModelProto, native: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if native:
        del model.functions[:]
        options.register_custom_ops_library(str(build_onnxruntime()))
    else:
        round_every_op(model)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_native_kernels_give_the_bits_of_the_bodies(
    form: FunctionForm, dtype: np.dtype[Any]
) -> None:
    """Also of rows with huge numbers, inf and NaN. In fp32 an exponential that differs in the last bits
    of fp64 may be seen.
    """
    body, native = (session_of(model_of(form, dtype), which) for which in (False, True))
    for loud in (1.0, 2e4, np.inf, np.nan):
        inputs = inputs_of(form, loud)
        feeds = {name if name == "position_ids" else f"{name}32": x for name, x in inputs.items()}
        for got, want in zip(native.run(None, feeds), body.run(None, feeds), strict=True):
            if dtype == F32 and isinstance(form, Activation):
                np.testing.assert_allclose(got, want, rtol=2.0**-22, atol=2.0**-20)
            else:
                np.testing.assert_array_equal(got, want)


def test_equal_forms_share_a_function() -> None:
    factory = NodeFactory(TensorProto.FLOAT16)
    forms = [ResidualSum(), RMSNorm(1e-5), ResidualSum(), ResidualSum(0.5), RMSNorm(1e-6)]
    calls = [factory.call(form, "node", form.inputs, form.outputs) for form in forms]
    assert [[(node.domain, node.op_type) for node in nodes] for nodes in calls] == [
        [("anybit_pointwise", "ResidualSum")],
        [("anybit_pointwise", "RMSNorm")],
        [("anybit_pointwise", "ResidualSum")],
        [("", node.op_type) for node in ResidualSum(0.5).function(TensorProto.FLOAT16).node],
        [("", "RMSNormalization")],  # a parser that goes by names alone would take the first
    ]
    assert len(factory.functions()) == 2


def test_a_second_form_is_its_body() -> None:
    """The same numbers as a call of it, under names of its own."""
    form = RotatedHeads(**HEADS, rotary=16)
    model = model_of(form, F32)
    factory = NodeFactory(TensorProto.FLOAT)
    factory.call(RotatedHeads(**HEADS), "first", ["qkv"], ["a", "b", "c"])
    (call,) = [node for node in model.graph.node if is_inlined(node.domain)]
    written = factory.call(form, "second", list(call.input), list(call.output))
    assert all(not node.domain and node.name.startswith("second.") for node in written)
    place = list(model.graph.node).index(call)
    nodes = [*model.graph.node[:place], *written, *model.graph.node[place + 1 :]]
    body = onnx.ModelProto()
    body.CopyFrom(model)
    del body.graph.node[:], body.functions[:]
    body.graph.node.extend(nodes)
    feeds = {
        name if name == "position_ids" else f"{name}32": x
        for name, x in inputs_of(form, 1.0).items()
    }
    for got, want in zip(
        session_of(body, False).run(None, feeds),
        session_of(model, False).run(None, feeds),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (
            RotatedHeads(**HEADS, rotary=16),
            {"position_ids": np.full((2, TOKENS), POSITIONS)},
            "RotatedHeads input position_ids: got position 20, expected 0 to 19. Feed fewer tokens, "
            "or start a new sequence.",
        ),
        (
            RotatedHeads(**HEADS, norm=EACH_HEAD),
            {"query_gain": np.ones(17, np.float32)},
            "RotatedHeads input query_gain: got fp32 [17], expected fp32 [16]. Feed tensors that fit "
            "each other.",
        ),
        (
            ResidualSum(),
            {"value": np.ones((2, 6, WIDTH), np.float32)},
            "ResidualSum input value: got fp32 [2, 6, 96], expected fp32 [2, 7, 96]. Feed tensors "
            "that fit each other.",
        ),
        (
            Activation("silu", 1),
            {"x": np.ones((2, TOKENS, 3), np.float32)},
            "Activation input x: got fp32 [2, 7, 3], expected [..., an even number]. Feed tensors "
            "that fit each other.",
        ),
    ],
    ids=["position", "gain", "rows", "odd"],
)
def test_tensors_that_do_not_fit_are_named(
    form: FunctionForm, changes: dict[str, np.ndarray], message: str
) -> None:
    model = model_of(form, F32)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    inputs = inputs_of(form) | changes
    feeds = {name if name == "position_ids" else f"{name}32": x for name, x in inputs.items()}
    with pytest.raises(Exception, match="got") as caught:
        session_of(model, True).run(None, feeds)
    assert message in str(caught.value)
