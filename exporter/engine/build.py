"""Builds a TensorRT engine from the ONNX model and the plugin library, and proves that the plugins
are in it.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from calibration.out.files import sha256_file, write_json
from calibration.out.layout import DATA_FILE, ENGINE, ENGINE_FILE, ENGINE_RECORD
from calibration.progress import NullProgress, Progress
from exporter.engine.edition import (
    captured_log,
    check_engine,
    gpu_capabilities,
    load_plugins,
    prepare_parser,
    select_edition,
)
from plugins.core.op_spec import is_custom
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "EngineBuilder",
    "EngineOptions",
    "build_engine",
    "check_engine",
    "custom_nodes",
    "input_dims",
    "load_plugins",
    "profile_shapes",
    "select_edition",
]

_NAMES_SHOWN = 5
# What the parser says of each node of a function that is called more than once.
_EVERY_CALL = "already exists, the output tensors of this new instance will not be queryable"


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine.

    Attributes:
        edition: "auto", "tensorrt" or "tensorrt-rtx".
        max_batch: largest batch.
        max_seq: most tokens of a sequence; the ONNX file must have as many positions.
        max_logits: most tokens in one call whose logits are wanted, of all sequences together.
    """

    edition: str = "auto"
    max_batch: int = 1
    max_seq: int = 2048
    max_logits: int = 512

    def __post_init__(self) -> None:
        for name, value in (("--max-batch", self.max_batch), ("--max-seq", self.max_seq)):
            if value < 1:
                raise InputError(
                    name, f"got {value}, expected at least 1", "Give a positive number"
                )


def custom_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Op type by node name of every custom node, in subgraphs and in called local functions too."""
    functions = {(function.domain, function.name): function for function in model.functions}

    def visit(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            if is_custom(node.domain):
                yield node  # its own function body is what the plugin replaces
                continue
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from visit(graph.node)
            if function := functions.get((node.domain, node.op_type)):
                yield from visit(function.node)

    found: dict[str, str] = {}
    for index, node in enumerate(visit(model.graph.node)):
        name = node.name or f"unnamed {node.op_type}"
        found[name if name not in found else f"{name} #{index}"] = node.op_type
    return found


def profile_shapes(
    inputs: Mapping[str, Sequence[int | str]], options: EngineOptions
) -> list[dict[str, Any]]:
    """Shapes of the two optimisation profiles, as engine.json holds them.

    "prefill" takes 1..max_seq new tokens behind 0..max_seq - 1 cached ones, so a prompt may come in
    pieces and a conversation go on, and gives logits of some of them, max_logits in all sequences of
    the batch together or one in each: an engine has room for as many as its profile allows, and a
    vocabulary's worth of numbers is large. "decode" takes one new token. The largest shapes fit each other
    (T = P + S), because TensorRT infers shapes at them; that new and cached tokens are max_seq at
    most, whoever runs the engine has to see to.

    Args:
        inputs: dimensions of each model input: integers, or B batch, S new tokens, L of them whose
            logits are wanted, P cached tokens, T = P + S.
        options: the limits.

    Raises:
        InputError: a dimension has another name.
    """
    batch, seq = options.max_batch, options.max_seq
    middle, logits = seq // 2, min(max(options.max_logits // batch, 1), seq)
    ranges: dict[str, dict[str, tuple[int, int, int]]] = {  # least, likely, most
        "prefill": {
            "B": (1, 1, batch),
            "S": (1, max(middle, 1), seq),
            "L": (1, 1, logits),
            "P": (0, 0, seq - 1),
            "T": (1, max(middle, 1), 2 * seq - 1),
        },
        "decode": {
            "B": (1, 1, batch),
            "S": (1, 1, 1),
            "L": (1, 1, 1),
            "P": (0, middle, seq - 1),
            "T": (1, middle + 1, seq),
        },
    }

    def shape(name: str, which: int, sizes: dict[str, tuple[int, int, int]]) -> list[int]:
        for dim in inputs[name]:
            if isinstance(dim, str) and dim not in sizes:
                known = ", ".join(sizes)
                raise InputError(
                    f"model input {name}",
                    f"got dimension {dim!r}, expected a number or one of {known}",
                    "Export the model again with this version",
                )
        return [sizes[dim][which] if isinstance(dim, str) else dim for dim in inputs[name]]

    def bounds(name: str, sizes: dict[str, tuple[int, int, int]]) -> dict[str, list[int]]:
        return {key: shape(name, which, sizes) for which, key in enumerate(("min", "opt", "max"))}

    return [
        {"name": profile, "inputs": {name: bounds(name, sizes) for name in inputs}}
        for profile, sizes in ranges.items()
    ]


def input_dims(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Dimensions of each model input: integers, or names."""
    shapes = {info.name: info.type.tensor_type.shape.dim for info in model.graph.input}
    return {
        name: [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
        for name, dims in shapes.items()
    }


def _shorten(items: Sequence[str]) -> str:
    more = len(items) - _NAMES_SHOWN
    return ", ".join(items[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name() or error.node()} ({error.node_operator()}): "
        f"{error.desc().strip()}"
        for error in errors[:_NAMES_SHOWN]
    )


class EngineBuilder:
    """One build: network, parser and configuration, which must live until the engine is written.

    Args:
        trt: the tensorrt module.
        onnx_path: the ONNX file, beside its weights.
        graph: what is parsed in its place, with the same weights.
    """

    def __init__(self, trt: Any, onnx_path: Path, graph: bytes | None = None) -> None:
        from polygraphy.backend.trt import create_network, get_trt_logger

        self.trt = trt
        self.where, self._graph = str(onnx_path), graph
        # TensorRT 11 knows nothing but strongly typed networks and may drop the flag.
        strongly_typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        self.builder, self.network = create_network(strongly_typed=strongly_typed)
        self.parser = trt.OnnxParser(self.network, get_trt_logger())

    def layer_counts(self) -> Counter[str]:
        """Layers of the network by type."""
        layers = (self.network.get_layer(index) for index in range(self.network.num_layers))
        return Counter(str(layer.type).removeprefix("LayerType.") for layer in layers)

    def parse(self, nodes: Mapping[str, str]) -> None:
        """Parse the ONNX file, and check that every custom node became a plugin.

        Raises:
            CheckError: the parser refused the file, or left a custom node to its function body.
        """
        whole = self._graph is None
        if not (
            self.parser.parse_from_file(self.where)
            if whole
            else self.parser.parse(self._graph, self.where)
        ):
            errors = _parser_errors(self.parser)
            raise CheckError(
                self.where,
                f"got parser errors: {errors}; expected a model that this TensorRT takes",
                "If a custom op is named, export the model again with this version; "
                "else use a newer TensorRT (10.15, 11, or RTX 1.7)",
            )
        layers = [self.network.get_layer(index) for index in range(self.network.num_layers)]
        plugins = [layer.name for layer in layers if layer.type == self.trt.LayerType.PLUGIN_V3]
        if len(plugins) == len(nodes):
            return
        missing = sorted(set(nodes) - set(plugins)) or sorted(nodes)
        raise CheckError(
            self.where,
            f"got {len(plugins)} plugin layers for {len(nodes)} custom nodes, expected one each; "
            f"missing: {_shorten(missing)}",
            "Without attribute plugin_namespace on a node TensorRT takes its function body: "
            "export the model again with this version",
        )

    def check_outputs(self, types: Mapping[str, int]) -> None:
        """Check that the network gives these tensors in these types of onnx.TensorProto.

        Raises:
            CheckError: one is not there, or of another type; names the first.
        """
        from onnx import TensorProto

        kinds = {
            TensorProto.FLOAT: self.trt.float32,
            TensorProto.FLOAT16: self.trt.float16,
            TensorProto.BFLOAT16: self.trt.bfloat16,
            TensorProto.INT8: self.trt.int8,
        }
        outputs = (self.network.get_output(index) for index in range(self.network.num_outputs))
        found = {tensor.name: tensor.dtype for tensor in outputs}
        for name, kind in types.items():
            if name not in found or found[name] != kinds[kind]:
                raise CheckError(
                    f"{self.where}, tensor {name}",
                    f"got {found.get(name, 'no output')}, expected an output of {kinds[kind]}",
                    "TensorRT read the graph otherwise than it is: report this",
                )

    def allow_fp32_attention(self) -> list[str]:
        """Let TensorRT compute attention from parts where it is fp32: no fused kernel exists for
        that type. Returns the names of the attentions.
        """
        from polygraphy.backend.trt import SetDecomposableAttentions

        inputs = (self.network.get_input(index) for index in range(self.network.num_inputs))
        layers = (self.network.get_layer(index).name for index in range(self.network.num_layers))
        end = "_AttentionInput"  # from TensorRT 10.14 on
        names = [name.removesuffix(end) for name in layers if name.endswith(end)]
        if not names or not any(tensor.dtype == self.trt.float32 for tensor in inputs):
            return []
        SetDecomposableAttentions((self.builder, self.network, self.parser))()
        return names

    def write(self, profiles: Sequence[Mapping[str, Any]], path: Path, progress: Progress) -> bool:
        """Build, and write the engine piece by piece, so that it is never whole in memory beside the
        builder's copy; says whether there is one.
        """
        from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

        made = []
        for profile in profiles:
            made.append(Profile())
            for name, shapes in profile["inputs"].items():
                made[-1].add(name, shapes["min"], shapes["opt"], shapes["max"])
        with _monitored(self.trt, progress) as monitor, path.open("wb") as file:
            load = PostprocessConfig(
                CreateConfig(profiles=made, progress_monitor=monitor), _without_tf32(self.trt)
            )
            config = load(self.builder, self.network)
            if not hasattr(self.trt, "IStreamWriter"):  # an early TensorRT 10
                engine = self.builder.build_serialized_network(self.network, config)
                return engine is not None and file.write(memoryview(engine)) > 0
            writer = _stream_writer(self.trt, file)
            done = self.builder.build_serialized_network_to_stream(self.network, config, writer)
            if writer.error is not None:
                raise writer.error
            return bool(done)


def _stream_writer(trt: Any, file: BinaryIO) -> Any:
    """What TensorRT hands the pieces of an engine to. An exception inside its callback would be lost:
    it is kept as `error`.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # a full disk
                self.error = error
                return 0

    return Writer()


def _without_tf32(trt: Any) -> Callable[..., None]:
    """fp32 means fp32: TensorFloat-32 keeps 10 bits."""

    def clear(builder: Any, network: Any, config: Any) -> None:
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)

    return clear


@contextmanager
def _monitored(trt: Any, progress: Progress) -> Iterator[Any]:
    """A progress monitor whose outermost phase drives the bar; after Ctrl-C the build ends with its
    current step.

    An exception inside TensorRT's callbacks is lost, so Ctrl-C only sets a flag that the callbacks
    return.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.root: str | None = None
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self.root is None and not parent_phase:
                self.root = phase_name
                progress.start(ENGINE, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.root:
                progress.advance()
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            pass

    monitor = Monitor()
    in_main = threading.current_thread() is threading.main_thread()
    before = (
        signal.signal(signal.SIGINT, lambda number, frame: setattr(monitor, "interrupted", True))
        if in_main
        else None
    )
    try:
        yield monitor
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
        if monitor.root is not None:
            progress.finish()
    if monitor.interrupted:
        raise KeyboardInterrupt


def build_engine(
    onnx_path: Path,
    plugin_library: Path,
    folder: Path,
    options: EngineOptions = EngineOptions(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write model.engine, the plugin library and engine.json into `folder`; returns what
    engine.json holds.

    Memory: the parser maps the weights, the builder has about two copies of its own.

    Raises:
        InputError: no TensorRT, or an unfit library. CheckError: the model does not parse or build,
            or a plugin is missing.
    """
    import onnx

    progress = progress or NullProgress()
    edition = select_edition(options.edition)
    model = onnx.load(str(onnx_path), load_external_data=False)
    nodes, profiles = custom_nodes(model), profile_shapes(input_dims(model), options)
    trt = edition.activate()
    with captured_log() as log:
        load_plugins(edition, plugin_library)
        prepare_parser(edition)
        build = EngineBuilder(trt, onnx_path)
        began = time.monotonic()
        build.parse(nodes)
        attentions = build.allow_fp32_attention()
        parsed, layers = time.monotonic(), build.layer_counts()
        if not build.write(profiles, folder / ENGINE_FILE, progress):
            raise CheckError(
                str(onnx_path),
                f"got no engine from {edition}: {_shorten(log.errors)}; expected one",
                "Lower --max-batch or --max-seq if memory is named; else report this",
            )
        built = time.monotonic()
        del build
    for text in log.warnings:
        if _EVERY_CALL not in text:
            progress.message(f"{edition.name}: {text}")
    shutil.copyfile(plugin_library, folder / plugin_library.name)
    record = {
        "format": 1,
        "edition": edition.name,
        "version": edition.version,
        "compute_capabilities": gpu_capabilities()[:1]
        if edition.name == "tensorrt"
        else [],  # empty: all it supports
        "profiles": profiles,
        "max_context": options.max_seq,
        "layers": dict(layers),
        "custom_nodes": dict(Counter(nodes.values())),
        "decomposable_attention": bool(attentions),
        "attentions": attentions,
        "parse_seconds": round(parsed - began, 2),
        "build_seconds": round(built - parsed, 2),
        "bytes": (folder / ENGINE_FILE).stat().st_size,
        "plugin_library": {"name": plugin_library.name, "sha256": sha256_file(plugin_library)},
        "source": {
            path.name: sha256_file(path)
            for path in (onnx_path, onnx_path.with_name(DATA_FILE))
            if path.is_file()
        },
    }
    write_json(folder / ENGINE_RECORD, record)
    return record
