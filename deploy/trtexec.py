"""python -m deploy trtexec: scripts for NVIDIA's trtexec: build from the ONNX file, time prefill, time
decode.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibration.out.layout import ENGINE, ENGINE_FILE, ENGINE_RECORD, MODEL_FILE, ONNX
from deploy.command import Command
from deploy.scripts import (
    WHICH,
    Which,
    cache_arrays,
    command,
    engine_record,
    head,
    script,
    shape_words,
    write_scripts,
)
from deploy.target import check_target
from exporter.engine.record import EngineRecord
from plugins.errors import CheckError, InputError

__all__ = [
    "COMMAND",
    "TOOLS",
    "Tool",
    "latencies",
    "scripts",
    "tool_of",
]

_BUILD = "build"
_ENGINE = "trtexec.engine"  # that the script builds in the current folder
_MEASURED = ("min", "median", "percentile(90%)", "percentile(99%)")  # in trtexec's words


@dataclass(frozen=True)
class Tool:
    """The tool of an edition from some version on.

    Attributes:
        program: its name.
        build: flags of every build.
        attention: the flag that takes names of attentions to be computed from parts, or "".
        plugins: the flag that takes a plugin library. --staticPlugins only opens it and waits for
            creators that register themselves; ours hands its out through getCreators.
    """

    program: str
    build: tuple[str, ...] = ("--skipInference",)
    attention: str = "--decomposableAttentions"
    plugins: str = "--dynamicPlugins"


# (edition, from this version on): networks are always strongly typed from TensorRT 11 on, and in
# TensorRT-RTX; Attention is a layer of its own from 10.14 on.
TOOLS: Mapping[tuple[str, tuple[int, int]], Tool] = {
    ("tensorrt", (10, 0)): Tool("trtexec", ("--skipInference", "--stronglyTyped"), attention=""),
    ("tensorrt", (10, 14)): Tool("trtexec", ("--skipInference", "--stronglyTyped")),
    ("tensorrt", (11, 0)): Tool("trtexec"),
    ("tensorrt-rtx", (1, 0)): Tool("tensorrt_rtx"),
}


def tool_of(record: EngineRecord) -> Tool:
    """The tool for an engine's edition and version.

    Raises:
        InputError: it is older than all that are known.
    """
    numbers = re.match(r"(\d+)\.(\d+)", record["version"])
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    known = {
        first: tool for (edition, first), tool in TOOLS.items() if edition == record["edition"]
    }
    fitting = [first for first in known if first <= version]
    if not fitting:
        oldest = ".".join(map(str, min(known)))
        raise InputError(
            ENGINE_RECORD,
            f"got {record['edition']} {record['version']}, expected {oldest} or later",
            "Build the engine again with a newer TensorRT",
        )
    return known[max(fitting)]


# ---------------------------------------------------------------- scripts


def scripts(out: Path) -> dict[str, str]:
    """{name: bash script}: build, then one for each profile.

    Raises:
        InputError: as engine_record does; the TensorRT is too old.
    """
    record = engine_record(out)
    tool = tool_of(record)
    made = {_BUILD: _build_script(out, record, tool)}
    for index, profile in enumerate(record["profiles"]):
        made[profile["name"]] = _time_script(out, record, tool, index)
    return made


def _start(out: Path, record: EngineRecord, what: str) -> list[str]:
    return [
        *head(out, f"{what}, {record['edition']} {record['version']}"),
        'join() { local IFS=,; echo "$*"; }',
        *cache_arrays(record),
    ]


def _shapes(flag: str, record: EngineRecord, index: int, which: Which) -> str:
    """--minShapes and its like of a profile, as a bash word."""
    words = shape_words(record, index, which, lambda shape: "x".join(map(str, shape)))
    return f'{flag}="$(join {" ".join(words)})"'


def _plugins(record: EngineRecord, tool: Tool) -> str:
    return f'{tool.plugins}="$OUT"/{ENGINE}/{shlex.quote(record["plugin_library"]["name"])}'


def _build_script(out: Path, record: EngineRecord, tool: Tool) -> str:
    """Builds an engine of the same profiles in the current folder, as the data-centre edition must on
    its GPU.
    """
    profiles = record["profiles"]
    lines = _start(out, record, "Build the same engine from the ONNX file")
    words = [
        tool.program,
        f'--onnx="$OUT"/{ONNX}/{MODEL_FILE}',
        f'--saveEngine="${{ENGINE:-{_ENGINE}}}"',
        _plugins(record, tool),
        *tool.build,
    ]
    for index in range(len(profiles)):
        words.append(f"--profile={index}")
        words += [_shapes(f"--{which}Shapes", record, index, which) for which in WHICH]
    if tool.attention and (names := record.get("attentions")):
        words.append(f"{tool.attention}={shlex.quote(','.join(names))}")
    return script(*lines, command(words))


def _time_script(out: Path, record: EngineRecord, tool: Tool, index: int) -> str:
    """Times an engine at the likely shapes of one profile, on random input."""
    profile = record["profiles"][index]
    what = f"Time {profile['name']} on random input"
    words = [
        tool.program,
        f'--loadEngine="${{ENGINE:-$OUT/{ENGINE}/{ENGINE_FILE}}}"',
        _plugins(record, tool),
        f"--useProfile={index}",
        _shapes("--shapes", record, index, "opt"),
    ]
    return script(*_start(out, record, what), command(words))


# ---------------------------------------------------------------- running


def run_scripts(made: Mapping[str, str], program: str, folder: Path) -> dict[str, dict[str, float]]:
    """Run them in a folder; returns {name: latencies}, of those that print any.

    Raises:
        InputError: the program is not there. CheckError: one failed.
    """
    if shutil.which(program) is None:
        raise InputError(
            "--run",
            f"got no {program} on the PATH, expected NVIDIA's tool",
            "Install TensorRT's command line tools, or copy the scripts to where they are (--to)",
        )
    found = {}
    for name, text in made.items():
        done = subprocess.run(
            ["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CheckError(
                f"{name}.sh",
                f"got exit code {done.returncode} from {program}, expected 0",
                "Look at what it says below",
                "\n".join((done.stdout + done.stderr).splitlines()[-20:]),
            )
        if times := latencies(done.stdout):
            found[name] = times
    return found


def latencies(text: str) -> dict[str, float]:
    """Of the GPU, in ms, from trtexec's summary: {"min", "median", "percentile(90%)", ...}; empty where
    there is none.
    """
    lines = re.findall(r"GPU Compute Time: (min = .*)", text)
    if not lines:
        return {}
    return {name: float(value) for name, value in re.findall(r"(\S+) = ([\d.]+) ms", lines[-1])}


def times_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each script."""
    rows = [["ms on the GPU", *(name.replace("percentile", "p") for name in _MEASURED)]]
    for name, times in found.items():
        cells = (f"{times[key]:.3f}" if key in times else "" for key in _MEASURED)
        rows.append([name, *cells])
    return "\n".join(f"{row[0]:<14}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


class Trtexec(Command):
    """Prints, writes or runs shell scripts."""

    name = "trtexec"
    help = "trtexec scripts for the engine"
    description = (
        "Print the bash scripts that build and time the engine with NVIDIA's own tool, write them "
        "to a folder, or run them."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where they go."""
        add = parser.add_argument
        add(
            "--to",
            type=Path,
            metavar="FOLDER",
            help="write build.sh, prefill.sh and decode.sh here",
        )
        add("--run", action="store_true", help="run them, and print what prefill and decode took")

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Do what is asked."""
        made = scripts(out)
        if args.to is not None:
            names = [*(f"{name}.sh" for name in made), _ENGINE]
            check_target(args.to, out, "trtexec", names)
            for path in write_scripts(made, args.to):
                print(path)
        elif not args.run:
            print("\n".join(made.values()), end="")
        if args.run:
            program = tool_of(engine_record(out)).program
            with tempfile.TemporaryDirectory() as scratch:
                print(times_table(run_scripts(made, program, args.to or Path(scratch))))


COMMAND = Trtexec()
