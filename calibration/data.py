"""Calibration and evaluation text: files, `datasets` names or the text that comes with the package,
cut into token windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.checkpoints.foreign import first_line
from calibration.text_file import TEXT_FIELDS, Say, bounded, existing, read_text
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.settings import CalibrationSettings

__all__ = [
    "calibration_windows",
    "check_tokens",
    "default_text",
    "load_text",
    "text_tokens",
    "windows_from_tokens",
]

_DEFAULT = Path(__file__).with_name("default_text.txt")
_FILES = (".txt", ".jsonl", ".json", ".md", ".gz")


def default_text() -> str:
    """Plain English prose on several topics, written for this project."""
    return _DEFAULT.read_text(encoding="utf-8")


def load_text(
    spec: str | None,
    offline: bool = False,
    where: str = "--calib",
    strict: bool = True,
    say: Say = lambda text: None,
) -> str:
    """The text behind a specification.

    Args:
        spec: a file as read_text takes it, a name of the `datasets` library as
            NAME[:CONFIG[:SPLIT]], or None for the default text.
        offline: never touch the network.
        where: the option named in errors.
        strict: refuse bytes that are no characters; else a few may become U+FFFD, for calibration
            takes what it gets.
        say: told when the text is so long that only its beginning is used.

    Raises:
        InputError: it is missing, not text, or empty.
    """
    if spec is None:
        return default_text()
    if path := existing(spec):
        text = read_text(path, where, strict, say)
    elif Path(spec).suffix in _FILES:
        raise InputError(
            where,
            f"got no such file {spec}, expected a .txt or .jsonl file or a dataset name",
            "Check the path",
        )
    else:
        text = _read_dataset(spec, offline, where)
    if not text.strip():
        raise InputError(
            where,
            f"got {spec} with no text in it",
            "Give a file with at least a few thousand words",
        )
    return text


def _read_dataset(spec: str, offline: bool, where: str) -> str:
    try:
        import datasets
    except ImportError:
        raise InputError(
            where,
            f"got {spec}, no such file, and dataset names need the package datasets",
            "Give a .txt or .jsonl file, or pip install datasets",
        ) from None
    name, config, split = [*spec.split(":"), "", ""][:3]
    download = datasets.DownloadConfig(local_files_only=offline)
    try:
        rows = datasets.load_dataset(
            name, config or None, split=split or "train", download_config=download
        )
        field = next(field for field in TEXT_FIELDS if field in rows.column_names)
    except StopIteration:
        raise InputError(
            where,
            f"got dataset {spec} with the columns {', '.join(rows.column_names)}, expected text",
            "Choose another dataset",
        ) from None
    except Exception as error:  # the library raises many kinds
        raise InputError(
            where,
            f"got {spec}, neither a file nor a dataset that can be loaded ({first_line(error)})",
            "Check the name (NAME[:CONFIG[:SPLIT]]), or give a .txt or .jsonl file",
        ) from None
    return bounded(text for text in rows[field] if isinstance(text, str) and text.strip())


def windows_from_tokens(tokens: np.ndarray, seqlen: int) -> np.ndarray:
    """Non-overlapping windows [n, seqlen] from the start; an incomplete last one is dropped."""
    count = len(tokens) // seqlen
    return tokens[: count * seqlen].reshape(count, seqlen)


def text_tokens(tokenizer: Any, text: str, vocab: int, where: str) -> np.ndarray:
    """Tokens of a text, int64 [n]; no special token is added. Raises as check_tokens does."""
    import numpy as np

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_tokens(tokenizer, ids, vocab, where)
    return np.asarray(ids, np.int64)


def check_tokens(tokenizer: Any, ids: Sequence[int], vocab: int, where: str) -> None:
    """Look whether the model knows every token: a tokenizer may have more than the embedding has
    rows.

    Raises:
        InputError: one is beyond it; names the first.
    """
    beyond = next((token for token in ids if token >= vocab), None)
    if beyond is not None:
        raise InputError(
            where,
            f"got the token {tokenizer.convert_ids_to_tokens(beyond)!r} with id {beyond}, expected "
            f"ids below the model's vocab_size of {vocab}",
            "Leave it out of the text, or give a model whose embedding has a row for it",
        )


def calibration_windows(
    tokenizer: Any,
    settings: CalibrationSettings,
    longest: int,
    vocab: int,
    offline: bool = False,
) -> tuple[np.ndarray, str]:
    """Windows of the calibration text: whole, not overlapping, drawn from all of the text by the
    seed; no BOS is added.

    A text too short for what was asked gives the windows it has; one shorter than a window gives a
    single shorter one.

    Args:
        longest: most tokens the model takes.
        vocab: rows of its embedding.

    Returns:
        int64 [n, L], and what is less than asked for, a line each, or "".

    Raises:
        InputError: the text is missing, empty, of a single token, or has one that the model does
            not know.
    """
    import numpy as np

    notes: list[str] = []
    text = load_text(settings.calib, offline, strict=False, say=notes.append)
    tokens = text_tokens(tokenizer, text, vocab, "--calib")
    if len(tokens) < 2:
        raise InputError(
            "--calib",
            f"got a text of {len(tokens)} tokens, expected at least 2",
            "Give a longer text",
        )
    seqlen = min(settings.seqlen, longest, len(tokens))
    windows = windows_from_tokens(tokens, seqlen)
    order = np.random.default_rng(settings.seed).permutation(len(windows))[: settings.nsamples]
    asked, found = (settings.nsamples, settings.seqlen), (len(order), seqlen)
    if asked != found:
        notes.append(
            f"Calibrating on {found[0]} windows of {found[1]} tokens; {asked[0]} of {asked[1]} "
            f"were asked for."
        )
    return windows[order], "\n".join(notes)
