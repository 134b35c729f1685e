"""What a stage's result depends on, as short hashes: settings, code, texts, files, package
versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from calibration.out.files import sha256_file
from calibration.text_file import existing
from plugins import extension_files

__all__ = [
    "CALIBRATION_CODE",
    "code_digest",
    "digest",
    "method_digest",
    "package_versions",
    "text_digest",
]

_ROOT = Path(__file__).resolve().parent.parent.parent
# What a quantised model depends on: all of calibration, and what an op is, but not how ONNX spells
# it.
CALIBRATION_CODE = ("calibration", "plugins/*/*.py", "!plugins/*/body.py")


def digest(*parts: Any) -> str:
    """Hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_digest(*patterns: str) -> str:
    """Hash of the project's source files that match, and of the ops of other packages.

    Args:
        patterns: of files, or of folders, which stand for their Python files, below the project's
            root; "!" before one leaves out what matches it.
    """
    wanted = {file for pattern in patterns if pattern[0] != "!" for file in _matching(pattern)}
    spared = {file for pattern in patterns if pattern[0] == "!" for file in _matching(pattern[1:])}
    files = sorted(wanted - spared)
    own = [(str(path.relative_to(_ROOT)), sha256_file(path)) for path in files]
    return digest(*own, *((path.name, sha256_file(path)) for path in extension_files()))


def _matching(pattern: str) -> Iterator[Path]:
    for path in _ROOT.glob(pattern):
        yield from path.rglob("*.py") if path.is_dir() else [path]


def method_digest(file: Path | None) -> dict[str, str]:
    """Name and SHA-256 of a method's file that is not one of the package's; {} of one that is."""
    return {} if file is None else {"file": file.name, "sha256": sha256_file(file)}


def text_digest(calib: str | None) -> str:
    """Hash of what is in a calibration text; a dataset goes by its name."""
    path = _ROOT / "calibration" / "default_text.txt" if calib is None else existing(calib)
    return sha256_file(path) if path and path.is_file() else str(calib)


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """{package: version} of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
