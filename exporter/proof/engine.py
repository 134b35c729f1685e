"""The proof engines: the graph in pieces with its inner tensors as outputs, built as the engine is, so
that each operator of TensorRT can be judged on the tensors that TensorRT gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calibration.out.layout import ENGINE_FILE, ENGINE_RECORD, MODEL_FILE
from calibration.progress import NullProgress
from exporter.engine.build import (
    EngineBuilder,
    EngineOptions,
    custom_nodes,
    input_dims,
    profile_shapes,
)
from exporter.engine.edition import (
    Edition,
    captured_log,
    check_engine,
    load_plugins,
    prepare_parser,
)
from exporter.proof.pieces import Piece, PieceRunner
from exporter.run.tensorrt import PieceEngine
from plugins.errors import CheckError

if TYPE_CHECKING:
    from calibration.out.folder import StageFolder

__all__ = ["Built", "ProofEngines"]


@dataclass
class Built:
    """What was built and checked so far.

    Attributes:
        engines, layers, tensors, plugins: engines, decoder layers in them, tensors that they give, and
            plugin layers.
    """

    engines: int = 0
    layers: int = 0
    tensors: int = 0
    plugins: int = 0

    def __str__(self) -> str:
        return (
            f"{self.engines} proof engines of {self.layers} decoder layers, the head counted, with "
            f"{self.plugins} plugin layers and {self.tensors} tensors as outputs"
        )


class ProofEngines:
    """Builds engines of pieces with the TensorRT and the plugin library of an engine.

    Args:
        stage: OUT/engine.
        onnx: OUT/onnx, from which it was built.
        options: the largest shapes; of the edition the engine's counts.

    Attributes:
        built: what build() has made.

    Raises:
        InputError: that TensorRT is not here.
    """

    def __init__(self, stage: StageFolder, onnx: Path, options: EngineOptions) -> None:
        folder = stage.file(ENGINE_RECORD).parent
        record = check_engine(folder)
        self._edition = Edition(record["edition"], record["version"])
        self._library = stage.file(record["plugin_library"]["name"])
        self._path, self._options = onnx / MODEL_FILE, options
        self.built = Built()

    def build(self, piece: Piece, path: Path) -> list[dict[str, Any]]:
        """Write a piece's engine; returns its profiles.

        Raises:
            CheckError: TensorRT refuses the piece, leaves a custom node to its body, or gives a marked
                tensor in another type.
        """
        graph = piece.model.graph
        profiles = profile_shapes(input_dims(piece.model), self._options)
        with captured_log() as log:
            trt = self._edition.activate()
            load_plugins(self._edition, self._library)
            prepare_parser(self._edition)
            builder = EngineBuilder(trt, self._path, piece.model.SerializeToString())
            builder.parse(custom_nodes(piece.model))
            types = {value.name: value.type.tensor_type.elem_type for value in graph.output}
            builder.check_outputs({name: kind for name, kind in types.items() if kind})
            builder.allow_fp32_attention()
            plugins = builder.layer_counts()["PLUGIN_V3"]
            written = builder.write(profiles, path, NullProgress())
        if not written:
            raise CheckError(
                f"{self._path}, decoder layers {piece.first} to {piece.end - 1}",
                f"got no engine from {self._edition}: {'; '.join(log.errors)}; expected one",
                "If memory is named, prove fewer tokens (--tokens); else report this",
            )
        self.built.engines += 1
        self.built.layers += piece.end - piece.first
        self.built.tensors += len(graph.output)
        self.built.plugins += plugins
        return profiles

    def check(self, piece: Piece) -> None:
        """Build a piece's engine, and let it go. Raises as build does."""
        with TemporaryDirectory() as folder:
            self.build(piece, Path(folder) / ENGINE_FILE)

    @contextmanager
    def runner(self, piece: Piece) -> Iterator[PieceRunner]:
        """A piece's engine on the GPU."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / ENGINE_FILE
            with PieceEngine(path, self.build(piece, path)) as runner:
                yield runner
