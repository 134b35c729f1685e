"""The project's own files: what git tracks, and nothing that lies beside it in a working folder."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

__all__ = ["REPOSITORY", "tracked_files"]

REPOSITORY = Path(__file__).resolve().parent.parent


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that git tracks; skips the test, or the module, where git cannot tell."""
    # A clone of somebody else is as good as one's own to list.
    command = ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z"]
    why = "no .git in the folder"
    if (REPOSITORY / ".git").exists():
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
        except OSError as error:
            why = f"git: {error.strerror}"
        else:
            if done.returncode == 0:
                names = filter(None, done.stdout.split("\0"))
                return tuple(path for name in names if (path := REPOSITORY / name).is_file())
            why = done.stderr.strip()
    pytest.skip(f"which files are the project's, git cannot say: {why}", allow_module_level=True)
