"""ONNX Runtime behind Polygraphy: a runner of the exported model, with inner tensors marked and bfloat16 carried in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.graph import MODEL_FILE
from plugins.core.errors import InputError

if TYPE_CHECKING:
    import onnx

__all__ = ["carry_bfloat16_in_float32", "load_model", "onnx_runner"]

# Float inputs of the standard ops in a decoder that ONNX Runtime's CPU provider lacks in bfloat16.
_FLOAT_INPUTS = {"Add": 2, "Mul": 2, "Sigmoid": 1, "MatMul": 2, "RMSNormalization": 2, "RotaryEmbedding": 3, "Attention": 3}


def load_model(folder: Path, marked: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph in `folder` without its weights, with the tensors in `marked` as outputs after its own.

    Raises:
        InputError: there is no model, or it is damaged.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from polygraphy.backend.onnx import ModifyOutputs

    path = folder / MODEL_FILE
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise InputError(str(path), "got no such file, expected the exported model", "Run python -m exporter first") from None
    except DecodeError as error:
        raise InputError(str(path), f"got a file that is not ONNX ({error})", "It is damaged: export the model again") from None
    if marked:
        outputs = list(model.graph.output)
        model.graph.value_info.extend(outputs)  # ModifyOutputs looks for types there
        model = ModifyOutputs(model, outputs=[*(value.name for value in outputs), *marked])()
    return model


def onnx_runner(folder: Path, marked: Sequence[str] = ()) -> Any:
    """A Polygraphy OnnxrtRunner on the CPU; the weights are read from the data file next to the model.

    Raises:
        InputError: the files are missing or ONNX Runtime refuses them (when the runner is activated).
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner

    model = load_model(folder, marked)
    carry_bfloat16_in_float32(model)

    def session() -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a kind of its own for each status
            raise InputError(str(folder / MODEL_FILE), f"got a model that ONNX Runtime refuses ({str(error).strip()})",
                             "The file or its data is damaged: export the model again") from None

    return OnnxrtRunner(session, name="onnxruntime")


def carry_bfloat16_in_float32(model: onnx.ModelProto) -> None:
    """Rewrite a bfloat16 graph so that ONNX Runtime's CPU provider and numpy can take it; other graphs stay as they are.

    Standard ops compute in fp32 and their results are rounded to bfloat16, as a bfloat16 kernel would; graph inputs and outputs
    become fp32 holding the same values. Custom ops keep bfloat16: their bodies cast by themselves.
    """
    from onnx import TensorProto

    graph = model.graph
    if not any(value.type.tensor_type.elem_type == TensorProto.BFLOAT16 for value in graph.input):
        return
    marked = {value.name for value in graph.output} - {"logits"}
    nodes = []
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            nodes.append(_cast(value.name, f"{value.name}.bfloat16", TensorProto.BFLOAT16))
    renamed = {node.input[0]: node.output[0] for node in nodes} | {name: f"{name}.bfloat16" for name in marked}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
        nodes += _in_float32(node) if not node.domain and node.op_type in _FLOAT_INPUTS else [node]
    nodes += [_cast(f"{name}.bfloat16", name, TensorProto.FLOAT) for name in sorted(marked)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _in_float32(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx import TensorProto

    casts, output = [], node.output[0]
    for index in range(_FLOAT_INPUTS[node.op_type]):
        wide = f"{output}.input{index}"
        casts.append(_cast(node.input[index], wide, TensorProto.FLOAT))
        node.input[index] = wide
    node.output[0] = f"{output}.float32"
    return [*casts, node, _cast(node.output[0], output, TensorProto.BFLOAT16)]


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)
