"""Runs the exported model in ONNX Runtime on the CPU, through Polygraphy: with inner tensors marked
and every 16-bit rounding in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, MODEL_FILE, ONNX
from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession, cache_names
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder

__all__ = ["RUNNER", "OnnxSession", "load_model", "onnx_runner", "round_every_op"]

# Float inputs of the standard ops of a decoder that compute, and whether they compute in fp64; all
# others only move data. Products and sums of two 16-bit numbers are as good as exact in fp32; the
# others differ between libraries there.
_FLOAT_INPUTS = {
    "Add": (2, False),
    "Mul": (2, False),
    "RotaryEmbedding": (3, False),
    "MatMul": (2, False),
    "Sigmoid": (1, True),
    "RMSNormalization": (2, True),
    "Attention": (3, True),
}


def load_model(folder: Path, marked: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph in `folder` without its weights, with the tensors in `marked` as outputs after its
    own.

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
        raise InputError(
            str(path),
            "got no such file, expected the exported model",
            "Run python -m exporter first",
        ) from None
    except DecodeError as error:
        raise InputError(
            str(path),
            f"got a file that is not ONNX ({error})",
            "It is damaged: export the model again",
        ) from None
    if marked:
        outputs = list(model.graph.output)
        model.graph.value_info.extend(outputs)  # ModifyOutputs looks for types there
        model = ModifyOutputs(model, outputs=[*(value.name for value in outputs), *marked])()
    return model


def onnx_runner(folder: Path, marked: Sequence[str] = ()) -> Any:
    """A Polygraphy OnnxrtRunner on the CPU; the weights are read from the data file next to the
    model.

    A 16-bit graph is rewritten by round_every_op first. That the file runs as it is, in fp32, is
    tested in tests/exporter/graph/test_graph.py.

    Raises:
        InputError: the files are missing or ONNX Runtime refuses them (when the runner is
            activated).
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner

    model = load_model(folder, marked)
    round_every_op(model)

    def session() -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a kind of its own for each status
            raise InputError(
                str(folder / MODEL_FILE),
                f"got a model that ONNX Runtime refuses ({str(error).strip()})",
                "The file or its data is damaged: export the model again",
            ) from None

    return OnnxrtRunner(session, name="onnxruntime")


def round_every_op(model: onnx.ModelProto) -> None:
    """Rewrite a graph so that ONNX Runtime's CPU provider rounds wherever the graph says so, and
    nowhere else.

    The provider has few fp16 and hardly any bfloat16 kernels. It casts around fp16 ops by itself
    but then drops the casts between two of them, so a custom op sees an input that was never
    rounded, and its activation codes differ from a real 16-bit run in about one of 2^(abits+2)
    places. Here each standard op computes in fp32, or in fp64 where fp32 results differ between
    libraries, and its result is rounded by a cast that stays: what the torch reference does too, so
    that the two agree to the last bit nearly everywhere and a chaotic low-bit model does not drift.
    bfloat16, which numpy lacks, becomes fp32 with the same values at the graph's inputs and
    outputs.
    """
    from onnx import TensorProto

    half = next(
        value.type.tensor_type.elem_type
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    )
    if half == TensorProto.BFLOAT16:
        _carry_ends_in_float32(model.graph)
    nodes = [
        made
        for node in model.graph.node
        for made in (
            _computed_wide(node, half)
            if not node.domain and node.op_type in _FLOAT_INPUTS
            else [node]
        )
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _carry_ends_in_float32(graph: onnx.GraphProto) -> None:
    from onnx import TensorProto

    inputs = [
        value for value in graph.input if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    ]
    outputs = [value for value in graph.output if value.name != "logits"]
    inside = {value.name: f"{value.name}.bfloat16" for value in (*inputs, *outputs)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inside.get(name, name) for name in names]
    nodes = [
        *(_cast(value.name, inside[value.name], TensorProto.BFLOAT16) for value in inputs),
        *graph.node,
        *(_cast(inside[value.name], value.name, TensorProto.FLOAT) for value in outputs),
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*inputs, *outputs):
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _computed_wide(node: onnx.NodeProto, half: int) -> list[onnx.NodeProto]:
    """The node between casts to a wide type and back; attention in its parts, since ONNX Runtime
    has no fp64 kernel for it.
    """
    from onnx import TensorProto

    inputs, precise = _FLOAT_INPUTS[node.op_type]
    if half == TensorProto.FLOAT and not precise:
        return [node]
    casts, output = [], node.output[0]
    for index in range(inputs):
        wide = f"{output}.input{index}"
        casts.append(
            _cast(node.input[index], wide, TensorProto.DOUBLE if precise else TensorProto.FLOAT)
        )
        node.input[index] = wide
    node.output[0] = f"{output}.wide"
    return [
        *casts,
        *(_attention_parts(node) if node.op_type == "Attention" else [node]),
        _cast(node.output[0], output, half),
    ]


def _attention_parts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """softmax(scale Q K^T where the mask allows) V of Q [B, H, S, D], K and V [B, KV, T, D], mask
    [B, 1, S, T], by query groups.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    query, key, value, mask = node.input
    prefix, nodes = node.output[0], []
    scale = next(item.f for item in node.attribute if item.name == "scale")

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(
            helper.make_node(
                op, inputs, [f"{prefix}.{name}"], name=f"{prefix}.{name}", **attributes
            )
        )
        return f"{prefix}.{name}"

    def const(name: str, array: np.ndarray) -> str:
        return add("Constant", [], name, value=numpy_helper.from_array(array))

    heads = add("Shape", [key], "kv_heads", start=1, end=2)
    size = add("Shape", [key], "head_dim", start=3, end=4)
    minus_one, zero, two = (
        const(f"int{index}", np.array([value], np.int64)) for index, value in enumerate((-1, 0, 2))
    )
    rows = add("Shape", [query], "rows", start=2, end=3)
    grouped = add(
        "Reshape",
        [query, add("Concat", [zero, heads, minus_one, rows, size], "grouped_shape", axis=0)],
        "grouped",
    )
    keys = add("Transpose", [add("Unsqueeze", [key, two], "key5")], "keys", perm=[0, 1, 2, 4, 3])
    scores = add(
        "Mul",
        [add("MatMul", [grouped, keys], "products"), const("scale", np.array(scale, np.float64))],
        "scores",
    )
    scores = add(
        "Where",
        [add("Unsqueeze", [mask, two], "mask5"), scores, const("never", np.array(-np.inf))],
        "masked",
    )
    weights = add("Softmax", [scores], "weights", axis=-1)
    context = add("MatMul", [weights, add("Unsqueeze", [value, two], "value5")], "context")
    shape = add("Shape", [query], "shape")
    nodes.append(helper.make_node("Reshape", [context, shape], [prefix], name=f"{prefix}.merge"))
    return nodes


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)


class OnnxRuntimeRunner(Runner):
    """The ONNX file on the CPU; the custom nodes run their bodies of standard ops."""

    name = "onnxruntime"
    stage = ONNX
    help = "the ONNX file on the CPU"
    automatic = True

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads the ONNX file and its weights."""
        for name in (MODEL_FILE, DATA_FILE):
            folder.file(name)
        return OnnxSession(folder.path, description.max_context)


class OnnxSession(DecoderSession):
    """ONNX Runtime on the CPU, through Polygraphy.

    It runs the graph as round_every_op rewrites it, with explicit casts around
    standard ops, so that every 16-bit rounding happens where the file says; the custom nodes and
    all weights are the file's.

    Args:
        folder: OUT/onnx.
        max_context: most tokens a sequence may have.
        marked: inner tensors that step() returns besides the model's outputs.
    """

    def __init__(self, folder: Path, max_context: int, marked: Sequence[str] = ()) -> None:
        super().__init__(max_context)
        self._runner = onnx_runner(folder, marked)
        self._runner.activate()
        inputs = self._runner.get_input_metadata()
        self._names = cache_names(inputs)
        meta = inputs["past_key_values.0.key"]
        self._cache_shape, self._dtype = (meta.shape[1], meta.shape[3]), meta.dtype
        self._clear()

    def _clear(self) -> None:
        self._cache: dict[str, np.ndarray] = {}

    def _forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        import numpy as np

        heads, width = self._cache_shape
        empty = np.zeros((len(input_ids), heads, 0, width), self._dtype)
        past = {f"past_key_values.{name}": self._cache.get(name, empty) for name in self._names}
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
            **past,
        }
        outputs: dict[str, np.ndarray] = self._runner.infer(feeds, check_inputs=False)
        self._cache = {name: outputs[f"present.{name}"] for name in self._names}
        return outputs

    def close(self) -> None:
        """Free the session."""
        if self._runner.is_active:
            self._runner.deactivate()


RUNNER = OnnxRuntimeRunner()
