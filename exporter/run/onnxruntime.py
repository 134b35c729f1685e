"""Runs the exported model in ONNX Runtime on the CPU, through Polygraphy: with inner tensors marked
and every 16-bit rounding in its place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.out.layout import DATA_FILE, MODEL_FILE, ONNX
from exporter.graph.names import is_layer_output
from exporter.run.forms import cache_bits, cache_form, with_numbers
from exporter.run.rounding import round_every_op
from exporter.run.runner import Runner
from exporter.run.sessions import DecoderSession, cache_names
from plugins.core.function import is_inlined
from plugins.core.op_spec import is_custom
from plugins.cores import usable_cores
from plugins.errors import InputError, UserError
from plugins.text import shown

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from calibration.out.description import Description
    from calibration.out.folder import StageFolder
    from plugins.tools.kernels import KernelLibrary

__all__ = [
    "RUNNER",
    "OnnxSession",
    "inference_session",
    "load_model",
    "onnx_runner",
    "own_of",
    "take_from_outside",
    "whole_graph",
]

_LONGEST = 300  # characters of a reason that stands in a message
_NO_MEMORY = ("Failed to allocate", "bad_alloc", "bad allocation")  # in ONNX Runtime's own words


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
    """Take a graph for damaged where ONNX Runtime refuses it, or where it is none of a decoder.

    Raises:
        InputError: it is. MemoryError, OSError: ONNX Runtime had too little memory or too few files,
            whatever it calls that. Any other error is one of ours, and passes through.
    """
    try:
        yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:
        reason = shown(" ".join(str(error).split()) or type(error).__name__, _LONGEST)
        if any(words in reason for words in _NO_MEMORY):
            raise MemoryError(reason) from None
        if (words := os.strerror(errno.EMFILE)) in reason:
            raise OSError(errno.EMFILE, words) from None
        theirs = isinstance(error, UnicodeError) or type(error).__module__.startswith("onnxruntime")
        if not (theirs or _damaged(folder)):
            raise
        raise InputError(
            str(folder / MODEL_FILE),
            f"got a model that cannot be run ({reason}), expected one as it was exported",
            "The file or its data is damaged or changed: export the model again",
        ) from None


def _damaged(folder: Path) -> bool:
    """Whether a graph breaks ONNX's own rules, has names that are no text, or lacks a decoder's
    inputs or outputs.
    """
    import onnx

    path = folder / MODEL_FILE
    try:
        onnx.checker.check_model(str(path))
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # a kind of its own for each rule
        return True
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    inputs = {name: [dim.dim_value for dim in dims] for name, dims in shapes.items()}
    names = cache_names(inputs)
    given = {value.name for value in graph.output}
    used = (name for node in graph.node for name in (*node.input, *node.output))
    return (
        any(isinstance(name, bytes) for name in used)
        or not {"logits", *(f"present.{name}" for name in names)} <= given
        or len(inputs.get("past_key_values.0.key", ())) != 4
        or not set(cache_form(inputs).inputs) <= inputs.keys()
    )


def onnx_runner(
    folder: Path,
    marked: Sequence[str] = (),
    kernels: Path | None = None,
    given: Sequence[str] = (),
) -> Any:
    """A Polygraphy OnnxrtRunner on the CPU; the weights are read from the data file next to the
    model.

    Args:
        folder: OUT/onnx.
        marked: inner tensors that are outputs too.
        kernels: a custom-op library that runs the custom nodes; None: their bodies do.
        given: inner tensors that are inputs; what their nodes make is an output, own_of(name).

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
        take_from_outside(model.graph, given)
        round_every_op(model)
    return OnnxrtRunner(
        lambda: inference_session(model.SerializeToString(), folder, kernels), name="onnxruntime"
    )


def own_of(tensor: str) -> str:
    """What a node makes of a tensor that is given."""
    return f"{tensor}.own"


def take_from_outside(graph: onnx.GraphProto, tensors: Sequence[str]) -> None:
    """Make inner tensors inputs, and what their nodes make of them outputs."""
    known = {value.name: value for value in graph.value_info}
    outputs = {value.name: value for value in graph.output}
    for name in tensors:
        node = next(node for node in graph.node if name in node.output)
        node.output[list(node.output).index(name)] = own_of(name)
        graph.input.append(known[name])
        own = outputs[name] if name in outputs else graph.output.add()
        own.CopyFrom(known[name])
        own.name = own_of(name)


def inference_session(graph: str | bytes, folder: Path, kernels: Path | None) -> Any:
    """An onnxruntime.InferenceSession on the CPU, with a thread for each core that the process may
    use.

    Args:
        graph: the path of an ONNX file, or what is in one.
        folder: where its weights are.
        kernels: as of onnx_runner.

    Raises:
        InputError: ONNX Runtime refuses the graph or the library, or would run the body of a custom
            node although there is a library.
    """
    # Before the first import, for those who use this without a command line (plugins/cli.py).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    from plugins.tools.kernels import KernelLibrary

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = usable_cores()
    if isinstance(graph, bytes):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
    with whole_graph(folder):
        if kernels is None:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        options.register_custom_ops_library(str(kernels))
        library = KernelLibrary(kernels)
        before = library.kernels_made()
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        made, nodes = library.kernels_made() - before, _nodes_with(library, graph)
    if made < nodes:
        raise InputError(
            str(folder / MODEL_FILE),
            f"got {nodes} custom nodes of which ONNX Runtime runs {nodes - made} by their function "
            f"bodies, expected native kernels for all",
            "The graph was changed, or has more than 256 schemes of an op: export the model again, "
            "or use --runner onnxruntime",
        )
    return session


def _nodes_with(library: KernelLibrary, graph: str | bytes) -> int:
    """Nodes of a graph whose ops the library has."""
    import onnx

    model = (
        onnx.load_model_from_string(graph)
        if isinstance(graph, bytes)
        else onnx.load(graph, load_external_data=False)
    )
    return sum(
        (is_custom(node.domain) and node.op_type in library.ops) or is_inlined(node.domain)
        for node in model.graph.node
    )


class OnnxRuntimeRunner(Runner):
    """The ONNX file on the CPU; the custom nodes run their bodies of standard ops."""

    name = "onnxruntime"
    stage = ONNX
    help = "the ONNX file on the CPU, every node from standard ops"
    automatic = 1

    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """Reads the ONNX file and its weights; shows the residual stream, for check_finite."""
        for name in (MODEL_FILE, DATA_FILE):
            folder.file(name)
        nodes = load_model(folder.path).graph.node
        with whole_graph(folder.path):
            layers = [name for node in nodes for name in node.output if is_layer_output(name)]
        return OnnxSession(folder.path, description.max_context, layers, description.dtype)


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
        kernels: as of onnx_runner.
        given: inner tensors that are taken from `lead` in place of what their nodes make, which is
            what step() returns.

    Attributes:
        lead: another session's outputs of the next step.
    """

    def __init__(
        self,
        folder: Path,
        max_context: int,
        marked: Sequence[str] = (),
        dtype: str = "float32",
        kernels: Path | None = None,
        given: Sequence[str] = (),
    ) -> None:
        super().__init__(max_context, dtype=dtype)
        self._folder, self._given = folder, given
        self.lead: Mapping[str, np.ndarray] = {}
        self._runner = onnx_runner(folder, marked, kernels, given)
        with whole_graph(folder):
            self._runner.activate()
            inputs = self._runner.get_input_metadata()
            self._names = cache_names(inputs)
            self._form = cache_form({name: meta.shape for name, meta in inputs.items()})
            self._past = {name: inputs[f"past_key_values.{name}"] for name in self._names}
            self._bits = cache_bits(load_model(folder).graph)
        self._clear()

    def _clear(self) -> None:
        self._cache: dict[str, np.ndarray] = {}

    def _forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> dict[str, np.ndarray]:
        import numpy as np

        rows = self._form.rows()
        cache = self._cache or {
            name: np.zeros((len(input_ids), meta.shape[1], rows, meta.shape[3]), meta.dtype)
            for name, meta in self._past.items()
        }
        past = {f"past_key_values.{name}": cache[name] for name in self._names}
        feeds = self._form.feeds(input_ids, attention_mask, positions, wanted) | past
        for name in self._given:
            feeds[name] = self._form.led(name, self.lead[name], attention_mask)
        with whole_graph(self._folder):
            outputs: dict[str, np.ndarray] = self._runner.infer(feeds, check_inputs=False)
            outputs |= {name: outputs.pop(own_of(name)) for name in self._given}
            self._cache = {name: outputs[f"present.{name}"] for name in self._names}
            found = with_numbers(
                self._form.restored(outputs, attention_mask), self._bits, self.dtype
            )
            return found | {"logits": found["logits"]}  # a graph without them is none of ours

    def close(self) -> None:
        """Free the session."""
        if self._runner.is_active:
            self._runner.deactivate()


RUNNER = OnnxRuntimeRunner()
