"""The artefact folder's manifest: whose folder it is, which stages are done, and what made them."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from calibration.out.fingerprint import package_versions
from calibration.out.json_file import Count, checked, read_json
from calibration.out.layout import MANIFEST, QUANT, QUANT_JSON, STAGES
from calibration.out.records import FileRecords
from plugins.errors import InputError

__all__ = [
    "FORMAT",
    "installed_versions",
    "open_manifest",
    "peak_rss",
    "read_manifest",
    "reset_peak_rss",
]

FORMAT = 1
PACKAGES = (
    "anybit-trt",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "polygraphy",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "numpy",
    "nvidia-cuda-nvcc",
)


_UNKNOWN = "What model this folder was made of cannot be told: choose another --out"
_EXPORT_AGAIN = "It is damaged or of another version: export the model again into a new folder"


class StageRecord(TypedDict):
    """What the manifest keeps of a finished stage."""

    fingerprint: str
    seconds: float
    peak_rss: Count
    files: FileRecords
    facts: NotRequired[dict[str, Any]]


class Request(TypedDict):
    """The part of a request that is looked into; the rest is compared as it is."""

    content: NotRequired[dict[str, str]]


class Manifest(TypedDict):
    """What the manifest holds, its format aside; `stages` by name, each a StageRecord."""

    request: Request
    stages: dict[str, Any]
    versions: NotRequired[dict[str, str]]
    command: NotRequired[list[str]]


class _Source(TypedDict):
    fingerprint: str


class _Made(TypedDict):
    """What quant.json says of the model."""

    source: _Source


def installed_versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a number, for the manifest."""
    return {"python": sys.version.split()[0], **package_versions(PACKAGES)}


def peak_rss() -> int:
    """Peak resident bytes since the last reset (Linux VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return (
            next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
            * 1024
        )
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_rss() -> None:
    """Let peak_rss count from here; does nothing where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # the peak then counts earlier stages too


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose every field has the right type, its stages in order.

    Raises:
        InputError: it is missing, damaged, or of another format.
    """
    manifest = read_json(path, _EXPORT_AGAIN)
    if manifest.get("format") != FORMAT:
        raise InputError(
            str(path),
            f"got format {json.dumps(manifest.get('format'))}, expected {FORMAT}",
            _EXPORT_AGAIN,
        )
    stages = checked(manifest, Manifest, str(path), _EXPORT_AGAIN)["stages"]
    for name, record in stages.items():
        checked(record, StageRecord, f"{path}, stages.{name}", _EXPORT_AGAIN)
    return manifest | {"stages": {name: stages[name] for name in STAGES if name in stages}}


def open_manifest(
    out: Path, request: dict[str, Any], content: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The manifest of OUT, fresh or existing.

    What was spelled otherwise and is the same may replace or resume it: `model/`, `./model` and the
    hub's name of what lies there are one model.

    Args:
        out: the artefact folder.
        request: model and settings; a folder with a finished stage must have been made with the
            same.
        content: fingerprints of what entries of `request` only name, "model" among them; without
            the model's, it is not looked at.

    Raises:
        InputError: OUT cannot be read, is not ours, or belongs to another model or setting, or its
            manifest is damaged.
    """
    content = content or {}
    try:
        strangers = _strangers(out)
    except OSError as error:
        raise InputError(
            str(out),
            f"got {error.strerror}, expected a folder that can be read",
            "Choose another --out",
        ) from error
    if strangers:
        raise InputError(
            str(out),
            f"got a folder with other files in it ({strangers[0]}), "
            f"expected a new or an artefact folder",
            "Choose another --out",
        )
    fresh = {"format": FORMAT, "request": {**request, "content": dict(content)}, "stages": {}}
    if not (out / MANIFEST).exists():
        return fresh
    manifest = read_manifest(out / MANIFEST)
    if not manifest["stages"]:
        return fresh
    recorded, made_of = manifest["request"], manifest["request"].get("content", {})
    if "model" in content:
        _check_model(out, recorded, request["model"], content["model"])
    for key, expected in request.items():
        got = recorded.get(key)
        same = key in content and content[key] == made_of.get(key)
        if key != "model" and not same and got != expected:
            theirs, ours = map(", ".join, zip(*_differences(key, got, expected), strict=True))
            raise InputError(
                str(out),
                f"got an artifact with {theirs}, expected {ours}",
                "Choose another --out, or delete this folder",
            )
    return manifest | {"request": {**request, "content": {**made_of, **content}}}


def _check_model(out: Path, recorded: Mapping[str, Any], model: str, fingerprint: str) -> None:
    """The weights are the same, whatever they are called. Artifacts of version 0.1 have their
    fingerprint in quant.json only.
    """
    made_of = recorded.get("content", {}).get("model")
    if made_of is None:
        path = out / QUANT / QUANT_JSON
        made_of = checked(read_json(path, _UNKNOWN), _Made, str(path), _UNKNOWN)["source"][
            "fingerprint"
        ]
    if made_of != fingerprint:
        raise InputError(
            str(out),
            f"got an artifact of another model or config (model {json.dumps(recorded.get('model'))}, "
            f"fingerprint {made_of[:12]}), expected those of {model} ({fingerprint[:12]})",
            "Choose another --out",
        )


def _strangers(out: Path) -> list[str]:
    """What lies in a folder that has no manifest."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise InputError(str(out), "got a file, expected a folder", "Choose another --out")
    names = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    return [] if MANIFEST in names else names


def _differences(name: str, got: Any, expected: Any) -> Iterator[tuple[str, str]]:
    """(got, expected) of all that differs, each with its name; of nested values only the innermost."""
    if isinstance(got, dict) and isinstance(expected, dict):
        for key in dict.fromkeys((*expected, *got)):
            if got.get(key) != expected.get(key):
                yield from _differences(f"{name}.{key}", got.get(key), expected.get(key))
    else:
        yield _shown(name, got), _shown(name, expected)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return f"no {name}"
    return f"empty {name}" if value in ({}, []) else f"{name} {json.dumps(value)}"
