"""Models of custom nodes alone, and their outputs in stock ONNX Runtime against the numpy
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from exporter.graph.nodes import NodeFactory
from plugins import op_spec
from plugins.core.activation import rms_norm
from plugins.core.op_spec import GemmAttributes, QuantArrays
from tests.plugins.kernel_cases import (
    BF16,
    F16,
    F32,
    abq,
    abq_arrays,
    assert_same_bits,
    op_of,
    qqq,
    qqq_arrays,
    tokens,
)

__all__ = ["ELEMENT", "Case", "abq_case", "check", "model_of", "qqq_case", "session_of"]

Case = tuple[GemmAttributes, QuantArrays]
ELEMENT = {F16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16, F32: TensorProto.FLOAT}


def inputs_of(
    attrs: GemmAttributes, arrays: QuantArrays, dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    """The node's initializers, in a model of this type."""
    packed = op_spec(op_of(arrays)).pack(arrays, attrs, "test")
    return packed | (
        {"gamma": tokens(1, attrs.in_features, dtype, seed=1)[0]} if attrs.has_norm else {}
    )


def model_of(cases: Sequence[Case], dtype: np.dtype[Any], rank: int = 2) -> onnx.ModelProto:
    """X fp32 -> cast to dtype -> one custom node per case -> Y0, Y1, ... cast to fp32; dynamic
    sizes but for K.
    """
    factory = NodeFactory(ELEMENT[dtype])
    nodes, initializers, outputs = (
        [helper.make_node("Cast", ["X32"], ["X"], to=ELEMENT[dtype])],
        [],
        [],
    )
    leading = [f"dim{i}" for i in range(rank - 1)]
    for i, (attrs, arrays) in enumerate(cases):
        spec = op_spec(op_of(arrays))
        packed = inputs_of(attrs, arrays, dtype)
        names = [f"gemm{i}.{name}" for name in spec.input_names(attrs)[1:]]
        initializers += [
            numpy_helper.from_array(packed[name.split(".")[1]], name) for name in names
        ]
        nodes.append(factory.gemm(spec.name, attrs, f"gemm{i}", ["X", *names], f"gemm{i}.output"))
        nodes.append(helper.make_node("Cast", [f"gemm{i}.output"], [f"Y{i}"], to=TensorProto.FLOAT))
        outputs.append(
            helper.make_tensor_value_info(
                f"Y{i}", TensorProto.FLOAT, [*leading, attrs.out_features]
            )
        )
    x = helper.make_tensor_value_info("X32", TensorProto.FLOAT, [*leading, cases[0][0].in_features])
    graph = helper.make_graph(nodes, "gemms", [x], outputs, initializers)
    return helper.make_model(
        graph, ir_version=11, functions=factory.functions(), opset_imports=factory.opset_imports(23)
    )


def session_of(model: onnx.ModelProto, optimised: Path | None = None) -> ort.InferenceSession:
    """One thread; optionally saves what is left after optimisation."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def check(cases: Sequence[Case], x: np.ndarray) -> list[np.ndarray]:
    """Run the cases in one session and compare each with its reference; returns the outputs as
    fp32.
    """
    session = session_of(model_of(cases, x.dtype, x.ndim))
    outputs = session.run(None, {"X32": x.astype(np.float32)})
    for (attrs, arrays), y in zip(cases, outputs, strict=True):
        spec = op_spec(op_of(arrays))
        inputs = inputs_of(attrs, arrays, x.dtype)
        want = spec.reference(x, inputs, attrs).astype(np.float32)
        assert y.shape == want.shape
        if attrs.abits < 16:
            assert_same_bits(y, want)
            continue
        # fp32 sums in another order: the error is proportional to the sum of |terms|
        rows = rms_norm(x, inputs["gamma"], attrs.norm_epsilon) if attrs.has_norm else x
        size = (
            np.abs(rows.astype(np.float64))
            @ np.abs(spec.dequantize(arrays, attrs).astype(np.float64)).T
            + 3
        )
        rounding = {2: 2.0**-8, 4: 2.0**-23}[x.dtype.itemsize] * np.abs(want)
        assert (np.abs(y.astype(np.float64) - want) <= 1e-6 * size + rounding).all()
    return list(outputs)


def abq_case(*args: Any, **options: Any) -> Case:
    attrs = abq(*args, **options)
    return attrs, abq_arrays(attrs)


def qqq_case(*args: Any, **options: Any) -> Case:
    attrs = qqq(*args, **options)
    return attrs, qqq_arrays(attrs)
