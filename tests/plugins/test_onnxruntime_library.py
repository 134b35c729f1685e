"""The custom-op library in ONNX Runtime: its kernels take the place of the function bodies and give
reference()'s bits, on any number of threads; what does not fit is refused.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from plugins import op_spec
from plugins.tools.build import build_onnxruntime
from tests.exporter.node_cases import Case, abq_case, inputs_of, model_of, qqq_case
from tests.plugins.kernel_cases import BF16, F16, F32, assert_close, op_of, tokens

REPOSITORY = Path(__file__).resolve().parents[2]
K = 192


def options_of(threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(build_onnxruntime()))
    return options


def native(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    return ort.InferenceSession(
        model.SerializeToString(), options_of(threads), providers=["CPUExecutionProvider"]
    )


def compare(cases: Sequence[Case], x: np.ndarray, outputs: Sequence[np.ndarray]) -> None:
    for (attrs, arrays), y in zip(cases, outputs, strict=True):
        spec, inputs = op_spec(op_of(arrays)), inputs_of(attrs, arrays, x.dtype)
        want = spec.reference(x, inputs, attrs)
        assert_close(y.astype(x.dtype), want, attrs, arrays, x)


def normed(case: Case) -> Case:
    return replace(case[0], norm_epsilon=1e-5), case[1]


CASES = [
    abq_case(70, K, bias=1),
    abq_case(70, K, g=64),
    qqq_case(70, K, bias=1),
    qqq_case(70, K, g=64),
    qqq_case(70, K),
    abq_case(70, K, g=32, minimum=1),
    abq_case(33, K, w=(2, 5), a=4, sym=1),
    abq_case(33, K, w=(8, 256), a=16, bias=1),
    normed(abq_case(33, K, bias=1)),
    normed(qqq_case(33, K, g=64, bias=1)),
    normed(qqq_case(33, K)),
]


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_native_kernels_run_and_give_the_bits_of_reference(
    dtype: np.dtype[Any], tmp_path: Path
) -> None:
    """The graph that is left after loading has the nodes themselves, where stock ONNX Runtime has
    their bodies.
    """
    cases, options = CASES[:8] if dtype == F16 else CASES[:7], options_of()
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    session = ort.InferenceSession(
        model_of(cases, dtype).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    left = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert sorted(set(left)) == ["ABQGemm", "Cast", "QQQGemm"]
    assert sum(name != "Cast" for name in left) == len(cases)
    x = tokens(5, K, dtype)
    compare(cases, x, session.run(None, {"X32": x.astype(np.float32)}))
    x[2, 3], x[4] = np.nan, np.inf
    compare(cases[:7], x, session.run(None, {"X32": x.astype(np.float32)})[:7])


def test_fused_norms() -> None:
    cases, x = CASES[8:], tokens(4, K, F16)
    outputs = native(model_of(cases, F16)).run(None, {"X32": x.astype(np.float32)})
    compare(cases, x, outputs)


def test_any_rank_and_no_tokens() -> None:
    session = native(model_of(CASES[:4], F16, rank=3))
    for shape in ((2, 3, K), (1, 1, K), (2, 0, K)):
        x = np.random.default_rng(0).normal(size=shape).astype(F16)
        outputs = session.run(None, {"X32": x.astype(np.float32)})
        for (attrs, arrays), y in zip(CASES[:4], outputs, strict=True):
            assert y.shape == (*shape[:2], attrs.out_features)
            if x.size:
                inputs = inputs_of(attrs, arrays, F16)
                want = op_spec(op_of(arrays)).reference(x, inputs, attrs)
                assert_close(y.astype(F16), want, attrs, arrays, x)


@pytest.mark.parametrize("m", [1, 3, 130])
def test_one_and_two_threads_and_sessions_side_by_side(m: int) -> None:
    """Layers that are large enough to be shared among threads; four sessions run at once, and one four
    times.
    """
    cases = [abq_case(700, 1024), qqq_case(700, 1024), qqq_case(700, 1024, g=128)]
    cases += [abq_case(700, 1024, g=128, sym=1, bias=1)]
    model, x = model_of(cases, F32), tokens(m, 1024, F32)
    outputs = native(model, 1).run(None, {"X32": x})
    compare(cases, x, outputs)
    sessions = [native(model, 2) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        runs = [*sessions, *sessions[:1] * 4]
        for other in pool.map(lambda session: session.run(None, {"X32": x}), runs):
            for got, want in zip(other, outputs, strict=True):
                np.testing.assert_array_equal(got, want)


def test_weights_that_the_graph_computes() -> None:
    """Inputs that are not constant are checked and read at each run."""
    case = qqq_case(64, K)
    model, x = model_of([case], F32), tokens(2, K, F32)
    weight = next(t for t in model.graph.initializer if t.name == "gemm0.weight")
    values = numpy_helper.to_array(weight)
    model.graph.initializer.remove(weight)
    model.graph.input.append(
        helper.make_tensor_value_info("gemm0.weight", TensorProto.INT32, ["rows", "columns"])
    )
    session = native(model)
    compare([case], x, session.run(None, {"X32": x, "gemm0.weight": values}))
    with pytest.raises(Exception, match="QQQGemm") as error:
        session.run(None, {"X32": x, "gemm0.weight": values[1:]})
    assert (
        "QQQGemm K 192 N 64 input weight: got int32 [11, 128], expected int32 [12, 128]. The "
        "weights do not fit the node's attributes: export the model again."
    ) in str(error.value)


def changed(case: Case, name: str, change: Any) -> onnx.ModelProto:
    """A model whose initializer `name` is changed."""
    model = model_of([case], F32)
    for tensor in model.graph.initializer:
        if tensor.name == f"gemm0.{name}":
            tensor.CopyFrom(
                numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name)
            )
    return model


@pytest.mark.parametrize(
    ("case", "name", "change", "message"),
    [
        (
            abq_case(40, K),
            "weight",
            lambda w: w[:3],
            "ABQGemm K 192 N 40 input weight: got int32 [3, 40, 8], expected int32 [4, 40, 8]",
        ),
        (
            abq_case(40, K, g=64),
            "zero",
            lambda w: w[:, :2],
            "ABQGemm K 192 N 40 input zero: got int32 [40, 2], expected int32 [40, 3]",
        ),
        (
            abq_case(40, K, g=64),
            "zero",
            lambda w: w.astype(np.float32),
            "ABQGemm K 192 N 40 input zero: got fp32 [40, 3], expected int32 [40, 3]",
        ),
        (
            abq_case(40, K, g=64, minimum=1),
            "minimum",
            lambda w: w.astype(np.int32),
            "ABQGemm K 192 N 40 input minimum: got int32 [40, 3], expected fp32 [40, 3]",
        ),
        (
            qqq_case(40, K, g=64),
            "scale_group",
            lambda w: w.astype(np.float32) * np.float32(1.0001),  # fp32 of fp16 would do
            "QQQGemm K 192 N 40 input scale_group: got fp32 [3, 40], expected fp16 [3, 40]",
        ),
        (
            qqq_case(40, K, bias=1),
            "bias",
            lambda w: w[:-1],
            "QQQGemm K 192 N 40 input bias: got fp32 [39], expected fp32 [40]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    case: Case, name: str, change: Any, message: str
) -> None:
    with pytest.raises(Exception, match="Gemm K 192") as error:
        native(changed(case, name, change))
    assert (
        f"{message}. The weights do not fit the node's attributes: export the model again."
        in str(error.value)
    )


@pytest.mark.parametrize(
    ("name", "abits", "more"), [("abits", 4, ""), ("has_minimum", 8, ", has_minimum 1")]
)
def test_attributes_that_the_op_does_not_take_are_refused(name: str, abits: int, more: str) -> None:
    model = model_of([qqq_case(40, K)], F32)
    node = model.graph.node[1]
    for attribute in [each for each in node.attribute if each.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, 4 if name == "abits" else 1))
    with pytest.raises(Exception, match="QQQGemm") as error:
        native(model)
    assert (
        f"QQQGemm K 192 N 40: got wbits 4, levels 16, abits {abits}, act_symmetric 1, group_size 0, "
        f"norm_epsilon 0.000000{more}, expected a combination that the op's README lists. Export the "
        "model again."
    ) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"head_dim": 1026}, "heads 2, kv_heads 1, head_dim 1026, rotary 0, norm 0"),
        ({"rotary": 15}, "heads 2, kv_heads 1, head_dim 16, rotary 15, norm 0"),
        ({"heads": 1 << 30}, "heads 1073741824, kv_heads 1, head_dim 16, rotary 0, norm 0"),
        ({"norm": 3}, "heads 2, kv_heads 1, head_dim 16, rotary 0, norm 3"),
    ],
    ids=str,
)
def test_heads_that_the_kernel_does_not_take_are_refused_when_loaded(
    changes: dict[str, int], got: str
) -> None:
    attributes = {"heads": 2, "kv_heads": 1, "head_dim": 16, "rotary": 0, "norm": 0, **changes}
    outputs = ["query", "key", "value"]
    node = helper.make_node(
        "RotatedHeads",
        ["qkv"],
        outputs,
        domain="anybit_pointwise",
        query_epsilon=0.0,
        key_epsilon=0.0,
        **attributes,
    )
    qkv, *heads = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b", "c", "d"][:rank])
        for name, rank in (("qkv", 3), *((name, 4) for name in outputs))
    )
    graph = helper.make_graph([node], "heads", [qkv], heads)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("anybit_pointwise", 1)]
    model = helper.make_model(graph, ir_version=11, opset_imports=imports)
    with pytest.raises(Exception, match="RotatedHeads") as error:
        native(model)
    assert (
        f"RotatedHeads: got {got}, expected some heads of 1 to 1024 channels, of which an even "
        "number turns, and a norm of 0 to 2. Run the file without this library, or export the model "
        "again."
    ) in str(error.value)


def run_with(value: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import onnxruntime as ort; from plugins.tools.build import build_onnxruntime\n"
        "ort.SessionOptions().register_custom_ops_library(str(build_onnxruntime()))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ANYBIT_CPU": value},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_anybit_cpu_names_an_instruction_set() -> None:
    assert run_with("portable").returncode == run_with("").returncode == 0
    refused = run_with("sse9")
    assert refused.returncode != 0
    assert "ANYBIT_CPU: got 'sse9', expected one of portable" in refused.stderr
    assert "which this machine runs. Unset it, or set one of these." in refused.stderr
