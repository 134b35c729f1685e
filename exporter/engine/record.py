"""engine.json: what an engine is of, which shapes it takes, and what it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict, cast

import msgspec

from calibration.out.json_file import Count, Size, checked, read_json
from calibration.out.layout import ENGINE_RECORD
from calibration.out.records import FileName, Sha256

__all__ = ["EngineRecord", "PluginLibrary", "Profile", "Shapes", "read_engine_record"]

Shape = list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]  # an empty cache has no tokens


class Shapes(TypedDict):
    """The least, the likely and the largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape


class Profile(TypedDict):
    """An optimization profile, by the engine's inputs."""

    name: str
    inputs: dict[str, Shapes]


class PluginLibrary(TypedDict):
    """The plugin library beside the engine."""

    name: FileName
    sha256: Sha256


class EngineRecord(TypedDict):
    """What engine.json holds.

    Attributes:
        edition, version: of the TensorRT that built it.
        compute_capabilities: of the GPU that it runs on; none: all that the edition supports.
        profiles: "prefill" and "decode".
        max_context: most tokens of a sequence, new and cached together.
        layers: how many of each type.
        custom_nodes: of the ONNX file, by op.
        decomposable_attention: whether attention is computed from parts.
        attentions: TensorRT's names of those that are.
        parse_seconds, build_seconds: what it took.
        bytes: of the engine.
        plugin_library: beside it.
        source: SHA-256 of the ONNX file and its weights, by their names.
    """

    format: int
    edition: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    compute_capabilities: list[str]
    profiles: Annotated[list[Profile], msgspec.Meta(min_length=2, max_length=2)]
    max_context: NotRequired[Size]
    layers: dict[str, Size]
    custom_nodes: dict[str, Size]
    decomposable_attention: bool
    attentions: NotRequired[list[str]]
    parse_seconds: float
    build_seconds: float
    bytes: Count
    plugin_library: PluginLibrary
    source: NotRequired[dict[FileName, Sha256]]


def read_engine_record(folder: Path) -> EngineRecord:
    """The record of the engine in `folder`.

    Raises:
        InputError: it is missing or damaged.
    """
    path, fix = folder / ENGINE_RECORD, "It is damaged: build the engine again"
    record = read_json(path, fix)
    checked(record, EngineRecord, str(path), fix)
    return cast(EngineRecord, record)
