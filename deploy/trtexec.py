"""python -m deploy trtexec: the commands of NVIDIA's trtexec for an artifact: build from the ONNX file,
time prefill, time decode.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from calibration.out.folder import command_for
from calibration.out.layout import ENGINE, ENGINE_FILE, ENGINE_RECORD, MODEL_FILE, ONNX
from deploy.command import Command
from exporter.engine.record import EngineRecord, Shapes, read_engine_record
from plugins.errors import InputError

__all__ = ["COMMAND", "build_command", "script", "time_command"]

_TOOLS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
_WHICH: tuple[Literal["min", "opt", "max"], ...] = ("min", "opt", "max")
_BREAK = " \\\n    "


def _shapes(inputs: Mapping[str, Shapes], which: Literal["min", "opt", "max"]) -> str:
    return ",".join(
        f"{name}:{'x'.join(str(size) for size in shape[which])}" for name, shape in inputs.items()
    )


def _plugins(engine: Path, record: EngineRecord) -> str:
    # --staticPlugins only opens a library and waits for creators that register themselves; ours
    # hands its out through getCreators, which is what --dynamicPlugins asks for.
    return f"--dynamicPlugins={engine / record['plugin_library']['name']}"


def _join(words: Sequence[str]) -> str:
    return _BREAK.join(shlex.quote(word) for word in words)


def build_command(out: Path, record: EngineRecord) -> str:
    """The command that builds OUT/engine/trtexec.engine with the same profiles, as the data-centre
    edition must on its GPU.
    """
    engine = out / ENGINE
    words = [
        _TOOLS[record["edition"]],
        f"--onnx={out / ONNX / MODEL_FILE}",
        f"--saveEngine={engine / 'trtexec.engine'}",
        _plugins(engine, record),
        "--skipInference",
    ]
    if record["edition"] == "tensorrt":
        words.append(
            "--stronglyTyped"
        )  # a no-op from TensorRT 11 on; TensorRT-RTX knows nothing else
    for index, profile in enumerate(record["profiles"]):
        words.append(f"--profile={index}")
        words += [f"--{which}Shapes={_shapes(profile['inputs'], which)}" for which in _WHICH]
    if names := record.get("attentions"):
        words.append(f"--decomposableAttentions={','.join(names)}")
    return _join(words)


def time_command(out: Path, record: EngineRecord, index: int) -> str:
    """The command that times the built engine at the likely shapes of one profile, on random input."""
    engine = out / ENGINE
    words = [
        _TOOLS[record["edition"]],
        f"--loadEngine={engine / ENGINE_FILE}",
        _plugins(engine, record),
        f"--useProfile={index}",
        f"--shapes={_shapes(record['profiles'][index]['inputs'], 'opt')}",
    ]
    return _join(words)


def script(out: Path) -> str:
    """A shell script with every command, from OUT/engine/engine.json.

    Raises:
        InputError: there is no engine, or its record is damaged.
    """
    path = out / ENGINE / ENGINE_RECORD
    if not path.is_file():
        raise InputError(
            str(path),
            "got no such file, expected the record of a built engine",
            f"Build one with: {command_for(out, ENGINE)}",
        )
    record = read_engine_record(path.parent)
    nodes = sum(record["custom_nodes"].values())
    parts = [
        f"# {record['edition']} {record['version']}, {nodes} plugin layers. Times are on random "
        "input.",
        "# Build the same engine from the ONNX file:",
        build_command(out, record),
    ]
    for index, profile in enumerate(record["profiles"]):
        parts += [f"# Time {profile['name']}:", time_command(out, record, index)]
    return "\n".join(parts)


class Trtexec(Command):
    """Prints a shell script."""

    name = "trtexec"
    help = "print trtexec commands for the engine"
    description = "Print the commands that build and time the engine with NVIDIA's own tool."

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Print the script."""
        print(script(out))


COMMAND = Trtexec()
