"""Perplexity of a decoder over non-overlapping windows of a text, each scored alone, without BOS."""

from __future__ import annotations

import math
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.progress import NullProgress, Progress
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    import numpy as np

    from exporter.run.model import Model
    from exporter.run.sessions import DecoderSession

__all__ = [
    "DEFAULT_SEQLEN",
    "EvalRequest",
    "score",
    "select_windows",
    "text_windows",
    "whole_windows",
    "window_nll",
]

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True)
class EvalRequest:
    """What to score.

    Attributes:
        text: a UTF-8 text file (or .jsonl with a field "text").
        windows: score this many windows, spread evenly; 0 is all.
        first: of the first ones only; 0 is all.
        seqlen: tokens of a window; 0 is 2048, or the model's context if that is shorter.
        runner: name of the runner, or "auto".
        option: the command line's name of the text, for messages.
    """

    text: Path
    _: KW_ONLY
    windows: int = 0
    first: int = 0
    seqlen: int = 0
    runner: str = "onnxruntime"
    option: str = "--text"


def text_windows(tokenizer: Any, path: Path, seqlen: int, option: str = "--text") -> np.ndarray:
    """Every whole window of the text, int64 [n, seqlen]; no special token is added.

    Raises:
        InputError: the file is missing, not text, empty or shorter than one window.
    """
    import numpy as np

    from calibration.data import load_text, windows_from_tokens

    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise InputError(option, f"got {kind} {path}, expected a UTF-8 text file", "Check the path")
    text = load_text(str(path), offline=True, where=option)
    tokens = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64
    )
    if len(tokens) < seqlen:
        shorter = f", or --seqlen {len(tokens)}" if len(tokens) > 1 and option == "--text" else ""
        raise InputError(
            option,
            f"got {path} with {len(tokens)} tokens, expected at least one window of {seqlen}",
            f"Give a longer text{shorter}",
        )
    return windows_from_tokens(tokens, seqlen)


def whole_windows(model: Model, request: EvalRequest) -> np.ndarray:
    """Every whole window of the request's text, int64 [n, seqlen]. Raises as text_windows does."""
    return text_windows(model.tokenizer(), request.text, _seqlen(model, request), request.option)


def _seqlen(model: Model, request: EvalRequest) -> int:
    return request.seqlen or min(DEFAULT_SEQLEN, model.description.context)


def select_windows(count: int, windows: int, first: int) -> list[int]:
    """Which of `count` windows are scored: `windows` of them, spread evenly over the first `first`;
    0 is all.

    Raises:
        InputError: more are asked for than there are.
    """
    pool = first or count
    for option, value, limit, which in (
        ("--first", first, count, "the whole windows of this text"),
        ("--windows", windows, min(pool, count), "the windows to choose from"),
    ):
        if value > limit:
            raise InputError(
                option,
                f"got {value}, expected at most {limit}, {which}",
                "Give a smaller number, a smaller --seqlen or a longer text",
            )
    wanted = windows or pool
    return [index * pool // wanted for index in range(wanted)]


def window_nll(session: DecoderSession, window: np.ndarray) -> float:
    """Sum of -log p(token t | tokens before it) over tokens 1..L-1 of one window [L], in fp64.

    The window goes through the decoder in pieces with the KV cache, so that memory holds one
    piece's logits.
    """
    import numpy as np

    total = 0.0
    for start in range(0, len(window) - 1, session.max_tokens):
        end = min(start + session.max_tokens, len(window) - 1)
        logits = session.run(window[None, start:end], reset=start == 0)[0]  # [S, V] fp32
        largest = logits.max(-1)
        log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64))
        total += float(
            (log_sum - logits[np.arange(end - start), window[start + 1 : end + 1]]).sum()
        )
    return total


def score(
    session: DecoderSession,
    model: Model,
    request: EvalRequest,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a text; returns {"ppl", "windows", "runner", "seqlen", "tokens", "seconds"}, tokens
    being the predicted ones.

    Raises:
        InputError: the text or the numbers are wrong. CheckError: the model computes NaN.
    """
    progress = progress or NullProgress()
    context, seqlen = model.description.context, _seqlen(model, request)
    if seqlen > session.max_context:
        rebuild = (
            ""
            if session.max_context == context
            else ", or build the engine with a larger --max-seq"
        )
        raise InputError(
            "--seqlen",
            f"got {seqlen}, expected at most {session.max_context}, the context with "
            f"{model.runner.name}",
            f"Give a smaller --seqlen{rebuild}",
        )
    windows = whole_windows(model, request)
    chosen = select_windows(len(windows), request.windows, request.first)
    progress.start("eval", len(chosen))
    total, began = 0.0, time.monotonic()
    for done, index in enumerate(chosen, 1):
        total += window_nll(session, windows[index])
        ppl = _perplexity(total, done * (seqlen - 1), index)
        progress.advance(1, f"perplexity {ppl:.4f}")
    progress.finish()
    return {
        "ppl": ppl,
        "windows": len(chosen),
        "runner": model.runner.name,
        "seqlen": seqlen,
        "tokens": len(chosen) * (seqlen - 1),
        "seconds": round(time.monotonic() - began, 2),
    }


def _perplexity(total: float, tokens: int, window: int) -> float:
    try:
        ppl = math.exp(total / tokens)
    except OverflowError:
        ppl = math.inf
    if not math.isfinite(ppl):
        raise CheckError(
            f"window {window}",
            f"got a mean negative log-likelihood of {total / tokens}, expected a finite perplexity",
            "The model is broken: look at the report's first bad layer",
        )
    return ppl
