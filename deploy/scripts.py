"""What the bash scripts of deploy/trtexec.py and deploy/polygraphy.py share: their beginning, the engine's
record, and its shapes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from calibration.out.folder import command_for
from calibration.out.layout import ENGINE, ENGINE_RECORD
from exporter.engine.record import EngineRecord, read_engine_record
from plugins.errors import InputError

__all__ = [
    "WHICH",
    "cache_arrays",
    "command",
    "engine_record",
    "head",
    "input_groups",
    "script",
    "shape_words",
    "write_scripts",
]

Which = Literal["min", "opt", "max"]
WHICH: tuple[Which, ...] = ("min", "opt", "max")
_CACHE = re.compile(r"(past_key_values)\.(\d+)\.(\w+)")


def head(out: Path, what: str) -> list[str]:
    """The first lines: what a script does, and where OUT is."""
    return [
        "#!/usr/bin/env bash",
        f"# {what}",
        "set -euo pipefail",
        f"OUT={shlex.quote(str(out.resolve()))}",
    ]


def command(words: Iterable[str]) -> str:
    """A command with a word or two on each line."""
    return " \\\n    ".join(words)


def script(*lines: str) -> str:
    """Lines as a file."""
    return "\n".join([*lines, ""])


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


def cache_arrays(record: EngineRecord) -> list[str]:
    """Lines of bash that set an array cache0, cache1, ... for every group of several inputs."""
    return [
        f"cache{place}=({word})"
        for place, (word, names) in enumerate(input_groups(record))
        if len(names) > 1
    ]


def shape_words(
    record: EngineRecord, index: int, which: Which, size: Callable[[Sequence[int]], str]
) -> list[str]:
    """name:size, as bash words, of the inputs at one end of a profile; cache_arrays are set before."""
    inputs = record["profiles"][index]["inputs"]
    return [
        f'"${{cache{place}[@]/%/:{size(inputs[names[0]][which])}}}"'
        if len(names) > 1
        else shlex.quote(f"{names[0]}:{size(inputs[names[0]][which])}")
        for place, (_, names) in enumerate(input_groups(record))
    ]


def write_scripts(made: Mapping[str, str], folder: Path) -> list[Path]:
    """Write NAME.sh of each into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in made.items():
        path = folder / f"{name}.sh"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        paths.append(path)
    return paths
