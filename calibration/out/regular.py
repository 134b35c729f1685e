"""Tells files from what only has a name like one."""

from __future__ import annotations

import stat
from pathlib import Path

from plugins.errors import InputError

__all__ = ["check_regular"]

_CHECK = "Check the path and the permissions"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(
    path: Path,
    expected: str,
    fix: str = _CHECK,
    option: str = "",
) -> int:
    """Refuse what is no regular file, or a link to one: a pipe or a device would never end.

    Args:
        expected: for the message, such as "a safetensors file".
        fix: what to do about one that is missing or no file, for the message.
        option: that named the path; without one, the path is where the error is.

    Returns:
        The file's bytes.

    Raises:
        InputError: it is not, or is missing, or may not be looked at.
    """
    try:
        status = path.stat()
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            return status.st_size
        got = _KINDS.get(kind, "no regular file")
    except FileNotFoundError:
        got = "no such file"
    except (OSError, ValueError) as error:  # a NUL in its name is a ValueError
        got = getattr(error, "strerror", None) or str(error)
        fix = _CHECK
    place = f" {path}" if option else ""
    raise InputError(option or str(path), f"got {got}{place}, expected {expected}", fix)
