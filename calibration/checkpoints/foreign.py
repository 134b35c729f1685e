"""What the readers of other people's files have in common: is it a file at all, and reasons that fit
a message.
"""

from __future__ import annotations

import pickle
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plugins.errors import InputError
from plugins.text import shown

__all__ = ["check_regular", "quiet_transformers", "reason"]

_LONGEST_REASON = 200  # characters


def reason(error: Exception) -> str:
    """What a library says is wrong, in a line; torch's advice to run the code in a file is left
    out.
    """
    line = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", line)
        return f"it calls {shown(found[1])}" if found else "it holds more than tensors"
    if not line or "weights_only" in line:
        return type(error).__name__
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers show neither bars nor warnings, where what it would warn of is looked at
    anyway.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_regular(path: Path, kind: str) -> None:
    """Refuse what is no regular file, or a link to one: a pipe or a device would never end.

    Args:
        kind: what is expected there, such as "a safetensors file".

    Raises:
        InputError: it is not, or is missing, or may not be looked at.
    """
    try:
        got = "" if stat.S_ISREG(path.stat().st_mode) else "no regular file"
    except OSError as error:
        got = error.strerror or str(error)
    if got:
        raise InputError(
            str(path), f"got {got}, expected {kind}", "Check the path and the permissions"
        )
