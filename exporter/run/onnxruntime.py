"""Runs the exported model in ONNX Runtime on the CPU, through Polygraphy: with inner tensors marked
and every 16-bit rounding in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, MODEL_FILE, ONNX
from exporter.run.rounding import round_every_op
from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession, cache_names
from plugins.errors import InputError, UserError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder


__all__ = ["RUNNER", "OnnxSession", "load_model", "onnx_runner", "whole_graph"]

_LONGEST = 300  # characters of a reason that stands in a message


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
    if not marked:
        return model
    with whole_graph(folder):
        outputs = list(model.graph.output)
        model.graph.value_info.extend(outputs)  # ModifyOutputs looks for types there
        return ModifyOutputs(model, outputs=[*(value.name for value in outputs), *marked])()


@contextmanager
def whole_graph(folder: Path) -> Iterator[None]:
    """Take a graph for damaged where working with it fails.

    Raises:
        InputError: it does, in any of the ways in which libraries fail.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise InputError(
            str(folder / MODEL_FILE),
            f"got a model that cannot be run ({reason}), expected one as it was exported",
            "The file or its data is damaged or changed: export the model again",
        ) from None


def onnx_runner(folder: Path, marked: Sequence[str] = ()) -> Any:
    """A Polygraphy OnnxrtRunner on the CPU; the weights are read from the data file next to the
    model.

    A 16-bit graph is rewritten by round_every_op first. That the file runs as it is, in fp32, is
    tested in tests/exporter/graph/test_graph.py.

    Raises:
        InputError: the files are missing or ONNX Runtime refuses them (when the runner is
            activated).
    """
    # Before the first import, for those who use this without a command line (plugins/cli.py).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from polygraphy.backend.onnxrt import OnnxrtRunner

    model = load_model(folder, marked)
    with whole_graph(folder):
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


class OnnxRuntimeRunner(Runner):
    """The ONNX file on the CPU; the custom nodes run their bodies of standard ops."""

    name = "onnxruntime"
    stage = ONNX
    help = "the ONNX file on the CPU, every node from standard ops"
    automatic = 1

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads the ONNX file and its weights."""
        for name in (MODEL_FILE, DATA_FILE):
            folder.file(name)
        return OnnxSession(folder.path, description.max_context, dtype=description.dtype)


class OnnxSession(DecoderSession):
    """ONNX Runtime on the CPU, through Polygraphy.

    It runs the graph as round_every_op rewrites it, with explicit casts around
    standard ops, so that every 16-bit rounding happens where the file says; the custom nodes and
    all weights are the file's.

    Args:
        folder: OUT/onnx.
        max_context: most tokens a sequence may have.
        marked: inner tensors that step() returns besides the model's outputs.
        dtype: of the model's floats.
    """

    def __init__(
        self,
        folder: Path,
        max_context: int,
        marked: Sequence[str] = (),
        dtype: str = "float32",
    ) -> None:
        super().__init__(max_context, dtype=dtype)
        self._folder = folder
        self._runner = onnx_runner(folder, marked)
        with whole_graph(folder):
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
        with whole_graph(self._folder):
            outputs: dict[str, np.ndarray] = self._runner.infer(feeds, check_inputs=False)
            self._cache = {name: outputs[f"present.{name}"] for name in self._names}
        return outputs

    def close(self) -> None:
        """Free the session."""
        if self._runner.is_active:
            self._runner.deactivate()


RUNNER = OnnxRuntimeRunner()
