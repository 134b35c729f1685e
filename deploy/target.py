"""Where a command may write its files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from plugins.errors import InputError

__all__ = ["check_target"]


def check_target(to: Path, out: Path, what: str, names: Collection[str]) -> None:
    """Look whether files may be written into a folder.

    Args:
        to: the folder.
        out: the artifact.
        what: is written, for the suggestion of another folder.
        names: of what an earlier call left there, which may be replaced.

    Raises:
        InputError: it lies in or around the artifact, or has other files in it.
    """
    where, there, own = f"--to {to}", to.resolve(), out.resolve()
    if there.is_relative_to(own) or own.is_relative_to(there):
        raise InputError(
            where,
            f"got a folder in or around the artifact {out}, expected one beside it",
            f"Choose another, such as --to {out}-{what}",
        )
    if not to.exists():
        return
    found = [path.name for path in to.iterdir()] if to.is_dir() else [to.name]
    if strangers := sorted(set(found) - set(names) if to.is_dir() else found):
        raise InputError(
            where,
            f"got a folder with other files in it ({strangers[0]}), expected a new one, or one "
            "that this command wrote before",
            "Choose another --to",
        )
