"""What a stage's result depends on, as short hashes: settings, code, texts, files, package
versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from calibration.out.files import sha256_file

__all__ = [
    "CALIBRATION_CODE",
    "code_digest",
    "digest",
    "file_stamps",
    "package_versions",
    "text_digest",
]

_ROOT = Path(__file__).resolve().parent.parent.parent

# What decides the codes: all of calibration, and what an op is, but not how it runs.
CALIBRATION_CODE = ("calibration", "plugins/core", "plugins/*/op.py")


def digest(*parts: Any) -> str:
    """Hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_digest(*places: str) -> str:
    """Hash of the Python files in the project's folders, and of its single files, that match the
    patterns `places`.
    """
    found = [path for place in places for path in _ROOT.glob(place)]
    files = sorted(
        {file for path in found for file in (path.rglob("*.py") if path.is_dir() else [path])}
    )
    return digest(*((str(path.relative_to(_ROOT)), sha256_file(path)) for path in files))


def text_digest(calib: str | None) -> str:
    """Hash of what is in a calibration text; a dataset goes by its name."""
    path = _ROOT / "calibration" / "default_text.txt" if calib is None else Path(calib).expanduser()
    return sha256_file(path) if path.is_file() else str(calib)


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file."""
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """{package: version} of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
