"""ONNX Runtime behind Polygraphy: a runner of the exported model, with inner tensors marked and every 16-bit rounding in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.graph import MODEL_FILE
from plugins.core.errors import InputError

if TYPE_CHECKING:
    import onnx

__all__ = ["load_model", "onnx_runner", "round_every_op"]

# Float inputs of the standard ops of a decoder that compute; all others only move data.
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
    round_every_op(model)

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


def round_every_op(model: onnx.ModelProto) -> None:
    """Rewrite a 16-bit graph so that ONNX Runtime's CPU provider rounds wherever the graph says so; fp32 graphs stay as they are.

    The provider has few fp16 and hardly any bfloat16 kernels. It casts around fp16 ops by itself but then drops the casts between
    two of them, so a custom op sees an input that was never rounded, and its activation codes differ from a real 16-bit run in about
    one of 2^(abits+2) places. Here each standard op computes in fp32 and its result is rounded by a cast that stays. bfloat16, which
    numpy lacks, becomes fp32 with the same values at the graph's inputs and outputs.
    """
    from onnx import TensorProto

    half = next(value.type.tensor_type.elem_type for value in model.graph.input if value.name.startswith("past_key_values."))
    if half == TensorProto.FLOAT:
        return
    if half == TensorProto.BFLOAT16:
        _carry_ends_in_float32(model.graph)
    nodes = [made for node in model.graph.node
             for made in (_in_float32(node, half) if not node.domain and node.op_type in _FLOAT_INPUTS else [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _carry_ends_in_float32(graph: onnx.GraphProto) -> None:
    from onnx import TensorProto

    inputs = [value for value in graph.input if value.type.tensor_type.elem_type == TensorProto.BFLOAT16]
    outputs = [value for value in graph.output if value.name != "logits"]
    inside = {value.name: f"{value.name}.bfloat16" for value in (*inputs, *outputs)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inside.get(name, name) for name in names]
    nodes = [*(_cast(value.name, inside[value.name], TensorProto.BFLOAT16) for value in inputs), *graph.node,
             *(_cast(inside[value.name], value.name, TensorProto.FLOAT) for value in outputs)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*inputs, *outputs):
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _in_float32(node: onnx.NodeProto, half: int) -> list[onnx.NodeProto]:
    from onnx import TensorProto

    casts, output = [], node.output[0]
    for index in range(_FLOAT_INPUTS[node.op_type]):
        wide = f"{output}.input{index}"
        casts.append(_cast(node.input[index], wide, TensorProto.FLOAT))
        node.input[index] = wide
    node.output[0] = f"{output}.float32"
    return [*casts, node, _cast(node.output[0], output, half)]


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)
