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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calibration.out.folder import command_for
from calibration.out.layout import ENGINE, ENGINE_FILE, ENGINE_RECORD, MODEL_FILE, ONNX
from deploy.command import Command
from exporter.engine.record import EngineRecord, read_engine_record
from plugins.errors import CheckError, InputError

__all__ = [
    "COMMAND",
    "TOOLS",
    "Tool",
    "cache_arrays",
    "engine_record",
    "input_groups",
    "latencies",
    "scripts",
    "tool_of",
    "write_scripts",
]

_WHICH: tuple[Literal["min", "opt", "max"], ...] = ("min", "opt", "max")
_BREAK = " \\\n    "
_BUILD = "build"
_CACHE = re.compile(r"(past_key_values)\.(\d+)\.(\w+)")
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


# ---------------------------------------------------------------- shapes


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", name)
    ]


def input_groups(record: EngineRecord) -> list[tuple[str, list[str]]]:
    """Inputs of the same shapes in every profile: (bash words for their names, the names). The cache of
    all layers is a word with braces where it is that regular; any other input is its own name.
    """
    profiles = [profile["inputs"] for profile in record["profiles"]]
    groups: dict[str, list[str]] = {}
    for name in sorted(profiles[0], key=_natural):
        alike = repr([sorted(inputs[name].items()) for inputs in profiles])
        groups.setdefault(alike if _CACHE.fullmatch(name) else name, []).append(name)
    return [
        (_braces(names) or " ".join(map(shlex.quote, names)), names) for names in groups.values()
    ]


def _braces(names: Sequence[str]) -> str:
    """past_key_values.{0..29}.{key,value} for just these names; "" where they are others."""
    parsed = [found.groups() for name in names if (found := _CACHE.fullmatch(name))]
    if not parsed:
        return ""
    layers = [*dict.fromkeys(int(layer) for _, layer, _ in parsed)]
    parts = [*dict.fromkeys(part for *_, part in parsed)]
    first, last = layers[0], layers[-1]
    regular = [
        f"past_key_values.{layer}.{part}" for layer in range(first, last + 1) for part in parts
    ]
    if list(names) != regular or first == last:
        return ""
    kinds = f"{{{','.join(parts)}}}" if len(parts) > 1 else parts[0]
    return f"past_key_values.{{{first}..{last}}}.{kinds}"


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _shapes(
    flag: str, record: EngineRecord, index: int, which: Literal["min", "opt", "max"]
) -> str:
    """--minShapes and its like of a profile, as a bash word."""
    inputs, words = record["profiles"][index]["inputs"], []
    for place, (word, names) in enumerate(input_groups(record)):
        size = _size(inputs[names[0]][which])
        words.append(f'"${{cache{place}[@]/%/:{size}}}"' if len(names) > 1 else f"{word}:{size}")
    return f'{flag}="$(join {" ".join(words)})"'


def cache_arrays(record: EngineRecord) -> list[str]:
    """Lines of bash that set an array cache0, cache1, ... for every group of several inputs."""
    return [
        f"cache{place}=({word})"
        for place, (word, names) in enumerate(input_groups(record))
        if len(names) > 1
    ]


# ---------------------------------------------------------------- scripts


def engine_record(out: Path) -> EngineRecord:
    """OUT/engine/engine.json.

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
    return read_engine_record(path.parent)


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


def _head(out: Path, record: EngineRecord, what: str) -> list[str]:
    return [
        "#!/usr/bin/env bash",
        f"# {what}, {record['edition']} {record['version']}",
        "set -euo pipefail",
        f"OUT={shlex.quote(str(out.resolve()))}",
        'join() { local IFS=,; echo "$*"; }',
        *cache_arrays(record),
    ]


def _command(words: Sequence[str]) -> str:
    return _BREAK.join(words)


def _plugins(record: EngineRecord, tool: Tool) -> str:
    return f'{tool.plugins}="$OUT"/{ENGINE}/{shlex.quote(record["plugin_library"]["name"])}'


def _build_script(out: Path, record: EngineRecord, tool: Tool) -> str:
    """Builds an engine of the same profiles in the current folder, as the data-centre edition must on
    its GPU.
    """
    profiles = record["profiles"]
    lines = _head(out, record, "Build the same engine from the ONNX file")
    words = [
        tool.program,
        f'--onnx="$OUT"/{ONNX}/{MODEL_FILE}',
        '--saveEngine="${ENGINE:-trtexec.engine}"',
        _plugins(record, tool),
        *tool.build,
    ]
    for index in range(len(profiles)):
        words.append(f"--profile={index}")
        words += [_shapes(f"--{which}Shapes", record, index, which) for which in _WHICH]
    if tool.attention and (names := record.get("attentions")):
        words.append(f"{tool.attention}={shlex.quote(','.join(names))}")
    return "\n".join([*lines, _command(words), ""])


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
    return "\n".join([*_head(out, record, what), _command(words), ""])


def write_scripts(made: Mapping[str, str], folder: Path, out: Path) -> list[Path]:
    """Write NAME.sh of each into a folder, which may be there; returns their paths.

    Raises:
        InputError: the folder lies in OUT.
    """
    if folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"--to {folder}",
            f"got a folder in the artifact {out}, expected one elsewhere",
            "Choose another --to",
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in made.items():
        path = folder / f"{name}.sh"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        paths.append(path)
    return paths


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
            for path in write_scripts(made, args.to, out):
                print(path)
        elif not args.run:
            print("\n".join(made.values()), end="")
        if args.run:
            program = tool_of(engine_record(out)).program
            with tempfile.TemporaryDirectory() as scratch:
                print(times_table(run_scripts(made, program, args.to or Path(scratch))))


COMMAND = Trtexec()
