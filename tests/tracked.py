"""The project's own files: what git tracks, and nothing that lies beside it in a working folder."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

__all__ = ["REPOSITORY", "listed", "may_be_tracked", "tracked_files"]

REPOSITORY = Path(__file__).resolve().parent.parent


def tracked_files() -> tuple[Path, ...]:
    """Every file that git tracks; skips the test where git cannot tell."""
    files = listed()
    if isinstance(files, str):
        pytest.skip(f"which files are the project's, git cannot say: {files}")
    return files


def may_be_tracked(path: Path) -> bool:
    """Whether a file is the project's; where git cannot tell, every file may be."""
    files = listed()
    return isinstance(files, str) or path in files


@cache
def listed() -> tuple[Path, ...] | str:
    """Every file that git tracks; or why it cannot tell."""
    # A clone of somebody else is as good as one's own to list.
    command = ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z"]
    if not (REPOSITORY / ".git").exists():
        return "no .git in the folder"
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"git: {error.strerror}"
    if done.returncode:
        return done.stderr.strip()
    names = filter(None, done.stdout.split("\0"))
    return tuple(path for name in names if (path := REPOSITORY / name).is_file())
