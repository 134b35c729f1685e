"""The artefact folder's manifest: whose folder it is, what made it, and one writer at a time."""

from __future__ import annotations

import fcntl
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from calibration.artifact import read_json
from plugins.core.errors import InputError

__all__ = ["MANIFEST", "installed_versions", "locked", "open_manifest", "peak_rss", "reset_peak_rss"]

MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "polygraphy", "tensorrt-rtx-cu13", "tensorrt", "numpy", "nvidia-cuda-nvcc")


def installed_versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("anybit-trt", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """Peak resident bytes since the last reset (Linux VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_rss() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # the peak then counts earlier stages too


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One process at a time in an OUT folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(str(out), f"got {error.strerror}, expected a folder that can be written", "Choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(str(out), "got a folder that another export is writing, expected a free one",
                             "Wait for it to end or choose another --out") from None
        yield


def open_manifest(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of OUT, fresh or existing.

    Args:
        out: the artefact folder.
        identity: model and settings; an existing folder must have been made with the same.

    Raises:
        InputError: OUT is not ours, or belongs to another model or setting, or its manifest is damaged.
    """
    path = out / MANIFEST
    if out.exists() and not out.is_dir():
        raise InputError(str(out), "got a file, expected a folder", "Choose another --out")
    if not path.exists():
        strangers = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")] if out.exists() else []
        if strangers:
            raise InputError(str(out), f"got a folder with other files in it ({strangers[0]}), "
                             "expected a new or an artefact folder", "Choose another --out")
        return {"format": 1, "request": identity, "stages": {}}
    manifest = read_json(path)
    for key, expected in identity.items():
        got = manifest.get("request", {}).get(key)
        if got != expected:
            raise InputError(str(out), f"got an artefact with {key} {_short(got, expected)}, expected {_short(expected, got)}",
                             "Choose another --out, or delete this folder")
    if not isinstance(manifest.get("stages"), dict):
        raise InputError(str(path), "got no stages, expected the manifest of an artefact folder", "It is damaged: delete this folder")
    return manifest


def _short(value: Any, other: Any) -> str:
    """A value for a message; of two dicts only what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    return json.dumps(value)
