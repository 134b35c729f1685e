"""ONNX Runtime behind Polygraphy: a runner of the exported model, with inner tensors marked and
every 16-bit rounding in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.graph.decoder import MODEL_FILE
from exporter.run.rounding import round_every_op
from plugins.errors import InputError

if TYPE_CHECKING:
    import onnx

__all__ = ["load_model", "onnx_runner"]


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
