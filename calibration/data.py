"""Calibration and evaluation text: files, `datasets` names or the text that comes with the package,
cut into token windows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.settings import CalibrationSettings

__all__ = [
    "calibration_windows",
    "default_text",
    "load_text",
    "tokens_from_text",
    "windows_from_tokens",
]

_DEFAULT = Path(__file__).with_name("default_text.txt")
_TEXT_FIELDS = ("text", "content")


def default_text() -> str:
    """Plain English prose on several topics, written for this project."""
    return _DEFAULT.read_text(encoding="utf-8")


def load_text(
    spec: str | None, offline: bool = False, where: str = "--calib", strict: bool = True
) -> str:
    """The text behind a specification.

    Args:
        spec: a .jsonl file (one object with "text" per line), any other file (plain UTF-8 text),
            a name of the `datasets` library as NAME[:CONFIG[:SPLIT]], or None for the default text.
        offline: never touch the network.
        where: the option named in errors.
        strict: refuse bytes that are not UTF-8; else they become U+FFFD, for calibration takes what
            it gets.

    Raises:
        InputError: it is missing, not text, or empty.
    """
    if spec is None:
        return default_text()
    path = Path(spec).expanduser()
    if path.is_file():
        text = _read_file(path, strict)
    elif path.exists() or path.suffix in (".txt", ".jsonl", ".json", ".md"):
        kind = "a folder" if path.is_dir() else "no such file"
        raise InputError(
            where,
            f"got {kind} {spec}, expected a .txt or .jsonl file or a dataset name",
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


def _read_file(path: Path, strict: bool) -> str:
    try:
        text = path.read_text(
            encoding="utf-8", errors="strict" if strict or path.suffix == ".jsonl" else "replace"
        )
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(
            str(path), f"got a file that is not UTF-8 text ({error})", "Save it as UTF-8"
        ) from None
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join(
        _json_text(path, number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    )


def _json_text(path: Path, number: int, line: str) -> str:
    fix = 'Write one object per line: {"text": "..."}'
    try:
        record = json.loads(line)
    except ValueError:
        raise InputError(f"{path}, line {number}", "got no valid JSON", fix) from None
    if isinstance(record, str):
        return record
    text = (
        next((record[field] for field in _TEXT_FIELDS if field in record), None)
        if isinstance(record, dict)
        else None
    )
    if not isinstance(text, str):
        raise InputError(f"{path}, line {number}", 'got no field "text" with a string', fix)
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
        field = next(field for field in _TEXT_FIELDS if field in rows.column_names)
    except StopIteration:
        raise InputError(
            where,
            f"got dataset {spec} with the columns {', '.join(rows.column_names)}, expected text",
            "Choose another dataset",
        ) from None
    except Exception as error:  # the library raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            where,
            f"got {spec}, neither a file nor a dataset that can be loaded ({reason})",
            "Check the name (NAME[:CONFIG[:SPLIT]]), or give a .txt or .jsonl file",
        ) from None
    return "\n\n".join(text for text in rows[field] if text.strip())


def windows_from_tokens(tokens: np.ndarray, seqlen: int) -> np.ndarray:
    """Non-overlapping windows [n, seqlen] from the start; an incomplete last one is dropped."""
    count = len(tokens) // seqlen
    return tokens[: count * seqlen].reshape(count, seqlen)


def tokens_from_text(
    tokenizer: Any, text: str, nsamples: int, seqlen: int, where: str = "--calib"
) -> np.ndarray:
    """The first `nsamples` non-overlapping windows of `seqlen` tokens, int64 [nsamples, seqlen]; no
    BOS is added.

    Raises:
        InputError: the text is empty or too short, with the counts.
    """
    import numpy as np

    if nsamples < 1 or seqlen < 2:
        raise InputError(
            "--nsamples, --seqlen",
            f"got {nsamples} windows of {seqlen} tokens, expected at least 1 of 2",
            "Give larger numbers",
        )
    tokens = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64
    )
    if len(tokens) < nsamples * seqlen:
        fits = (
            (len(tokens) // seqlen, seqlen) if len(tokens) >= seqlen else (1, max(len(tokens), 2))
        )
        raise InputError(
            where,
            f"got a text of {len(tokens)} tokens, expected at least {nsamples * seqlen} "
            f"({nsamples} windows of {seqlen})",
            f"Give a longer text, or --nsamples {fits[0]} --seqlen {fits[1]}",
        )
    return windows_from_tokens(tokens, seqlen)[:nsamples]


def calibration_windows(
    tokenizer: Any, settings: CalibrationSettings, longest: int, offline: bool = False
) -> tuple[np.ndarray, str]:
    """Windows of the calibration text: whole, not overlapping, drawn from all of the text by the
    seed; no BOS is added.

    A text too short for what was asked gives the windows it has; one shorter than a window gives a
    single shorter one.

    Args:
        longest: most tokens the model takes.

    Returns:
        int64 [n, L], and one line on what is less than asked for, or "".

    Raises:
        InputError: the text is missing, empty or of a single token.
    """
    import numpy as np

    text = load_text(settings.calib, offline, strict=False)
    tokens = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64
    )
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
    note = (
        ""
        if asked == found
        else f"Calibrating on {found[0]} windows of {found[1]} tokens; {asked[0]} of {asked[1]} "
        f"were asked for."
    )
    return windows[order], note
