"""What the readers of other people's files have in common: quiet libraries, and reasons that fit a
message.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plugins.text import one_line, shown

__all__ = ["DOWNLOAD_AGAIN", "first_line", "quiet_transformers", "reason", "without_negatives"]

DOWNLOAD_AGAIN = "The file is truncated or damaged: download it again"


def reason(error: Exception) -> str:
    """What a library says is wrong, in a line; torch's advice to run the code in a file is left
    out.
    """
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL\s+([\w.]+)", text)
        return f"it calls {shown(found[1])}" if found else "it holds more than tensors"
    return (
        type(error).__name__ if "weights_only" in text else one_line(text) or type(error).__name__
    )


def first_line(error: Exception) -> str:
    """What a library says is wrong, where a trace follows it."""
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__


def without_negatives(tokens: Any) -> Any:
    """What a file gives for a token id, or for a list of them: a negative one stands for none."""
    if isinstance(tokens, list):
        return [one for one in tokens if not _is_negative(one)]
    return None if _is_negative(tokens) else tokens


def _is_negative(token: Any) -> bool:
    return type(token) is int and token < 0


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
