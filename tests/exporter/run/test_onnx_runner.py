"""The ONNX Runtime runner: marked tensors, roundings that stay, missing and damaged files."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.run.onnxruntime import OnnxSession, load_model, onnx_runner, whole_graph
from exporter.run.rounding import round_every_op
from plugins.errors import InputError


def chain(dtype: int) -> onnx.ModelProto:
    """present = (x + y) * y, in `dtype`; logits = present as fp32."""
    nodes = [
        helper.make_node("Add", ["past_key_values.0.key", "y"], ["sum"]),
        helper.make_node("Mul", ["sum", "y"], ["present.0.key"]),
        helper.make_node("Cast", ["present.0.key"], ["logits"], to=TensorProto.FLOAT),
    ]
    inputs = [
        helper.make_tensor_value_info(name, dtype, [64]) for name in ("past_key_values.0.key", "y")
    ]
    outputs = [
        helper.make_tensor_value_info("present.0.key", dtype, [64]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [64]),
    ]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        ir_version=11,
        opset_imports=[helper.make_opsetid("", 23)],
    )


@pytest.mark.parametrize(
    "dtype, kind", [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)]
)
def test_each_op_rounds(dtype: int, kind: type, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(chain(dtype).SerializeToString())
    x, y = np.random.default_rng(0).standard_normal((2, 64)).astype(kind)
    want = ((x + y) * y).astype(np.float32)
    wide = np.float16 if kind is np.float16 else np.float32
    runner = onnx_runner(tmp_path)
    with runner:
        got = runner.infer({"past_key_values.0.key": x.astype(wide), "y": y.astype(wide)})
    np.testing.assert_array_equal(got["logits"], want)
    np.testing.assert_array_equal(got["present.0.key"].astype(np.float32), want)
    assert got["present.0.key"].dtype == wide
    unrounded = (x.astype(np.float32) + y.astype(np.float32)) * y.astype(np.float32)
    assert (
        unrounded.astype(kind).astype(np.float32) != want
    ).any()  # the test would notice a lost rounding


def test_float32_is_left_alone() -> None:
    model = chain(TensorProto.FLOAT)
    before = model.SerializeToString()
    round_every_op(model)
    assert model.SerializeToString() == before


def test_an_op_without_a_rule_is_refused() -> None:
    model = chain(TensorProto.FLOAT16)
    model.graph.node[0].op_type, model.graph.node[0].name = "Erf", "odd"
    with pytest.raises(ValueError, match="odd: got Erf, for which no rounding is known"):
        round_every_op(model)


def test_marked_tensors_come_after_the_models_own(tiny_export: Callable[..., Path]) -> None:
    folder = tiny_export() / "onnx"
    own = [value.name for value in load_model(folder).graph.output]
    marked = load_model(
        folder, ["model.layers.0.output", "model.layers.0.mlp.product"]
    ).graph.output
    assert [value.name for value in marked] == [
        *own,
        "model.layers.0.output",
        "model.layers.0.mlp.product",
    ]
    assert own[0] == "logits" and marked[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_missing_and_damaged_models_are_named(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InputError) as caught:
        onnx_runner(tmp_path)
    assert (
        str(caught.value)
        == f"{path}: got no such file, expected the exported model. Run python -m exporter first."
    )
    shutil.copy(tiny_export() / "onnx" / "model.onnx", path)
    with pytest.raises(InputError) as caught, onnx_runner(tmp_path):
        pass
    assert caught.value.where == str(path) and caught.value.problem.startswith(
        "got a model that cannot be run ("
    )
    assert "model.onnx.data" in caught.value.problem
    assert caught.value.fix == "The file or its data is damaged or changed: export the model again"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(InputError) as caught:
        onnx_runner(tmp_path)
    assert caught.value.where == str(path) and caught.value.problem.startswith(
        "got a file that is not ONNX ("
    )
    assert caught.value.fix == "It is damaged: export the model again"


def test_only_what_onnx_runtime_or_onnx_refuses_is_damaged(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    folder = tiny_export() / "onnx"
    ours: tuple[Exception, ...] = (KeyError("a"), ValueError("b"), OSError(5, "c"), MemoryError())
    for error in (*ours, InputError("a", "b", "c")):
        with pytest.raises(type(error)) as caught, whole_graph(folder):
            raise error
        assert caught.value is error
    for text in ("Failed to allocate memory for requested buffer of size 9", "std::bad_alloc"):
        with pytest.raises(MemoryError), whole_graph(folder):
            raise ort.RuntimeException(text)
    with pytest.raises(OSError) as system, whole_graph(folder):
        raise ort.Fail("model.onnx.data: Too many open files")
    assert system.value.errno == errno.EMFILE
    with pytest.raises(InputError) as refused, whole_graph(folder):
        raise ort.InvalidGraph("a  node\n" * 300)
    half = " ".join(["a node"] * 300)
    assert str(refused.value) == (
        f"{folder / 'model.onnx'}: got a model that cannot be run ({half[:150]} ... {half[-150:]}), "
        "expected one as it was exported. The file or its data is damaged or changed: export the "
        "model again."
    )


@pytest.mark.parametrize("name", ["past_key_values.0.key", "present.0.key", "logits", "input_ids"])
def test_a_graph_with_another_input_or_output_is_damaged(
    tiny_export: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_export() / "onnx", tmp_path / "onnx"))
    model = load_model(folder)
    for values in (model.graph.input, model.graph.output):
        for value in values:
            value.name = f"{name}_" if value.name == name else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_" if one == name else one for one in names]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError) as caught, OnnxSession(folder, 16) as session:
        session.run(np.array([[1, 2]]))
    assert caught.value.fix == "The file or its data is damaged or changed: export the model again"
