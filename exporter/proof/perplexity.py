"""Perplexity of a decoder over non-overlapping windows of a text, each scored alone, without BOS."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.progress import NullProgress, Progress
from exporter.proof.saved import SavedResults
from plugins.errors import CheckError, InputError

if TYPE_CHECKING:
    import numpy as np

    from exporter.run.model import Model
    from exporter.run.sessions import DecoderSession

__all__ = [
    "EvalRequest",
    "read_text",
    "score",
    "select_windows",
    "text_windows",
    "whole_windows",
    "window_length",
    "window_losses",
    "window_nll",
]


@dataclass(frozen=True)
class EvalRequest:
    """What to score.

    Attributes:
        text: a file as calibration.text_file.read_text takes it.
        windows: score this many windows, spread evenly; 0 is all.
        first: of the first ones only; 0 is all.
        seqlen: tokens of a window; 0 is 2048, or the longest sequence if that is shorter.
        runner: name of the runner, "cpu" or "auto".
        option: the command line's name of the text, for messages.
    """

    text: Path
    _: KW_ONLY
    windows: int = 0
    first: int = 0
    seqlen: int = 0
    runner: str = "cpu"
    option: str = "--text"


def text_windows(
    tokenizer: Any,
    path: Path,
    seqlen: int,
    vocab: int,
    option: str = "--text",
    say: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """Every whole window of the text, int64 [n, seqlen]; no special token is added.

    Args:
        tokenizer: of transformers.
        path: of the text.
        seqlen: tokens of a window.
        vocab: rows of the model's embedding.
        option: named in errors.
        say: told when the text is so long that only its beginning is used.

    Raises:
        InputError: the file is missing, not text, empty, shorter than one window, or has a token
            that the model does not know.
    """
    from calibration.data import text_tokens, windows_from_tokens

    text = read_text(path, option, say)
    tokens = text_tokens(tokenizer, text, vocab, option)
    if len(tokens) < seqlen:
        shorter = f", or --seqlen {len(tokens)}" if len(tokens) > 1 and option == "--text" else ""
        raise InputError(
            option,
            f"got {path} with {len(tokens)} tokens, expected at least one window of {seqlen}",
            f"Give a longer text{shorter}",
        )
    return windows_from_tokens(tokens, seqlen)


def read_text(path: Path, option: str, say: Callable[[str], None] = lambda text: None) -> str:
    """The text of a file. Takes `option` and `say` as text_windows does.

    Raises:
        InputError: the file is missing, not text or empty.
    """
    from calibration.data import load_text
    from calibration.text_file import existing

    if existing(str(path)) is None:
        raise InputError(option, f"got no such file {path}, expected a text file", "Check the path")
    return load_text(str(path), offline=True, where=option, say=say)


def whole_windows(
    model: Model, request: EvalRequest, say: Callable[[str], None] = lambda text: None
) -> np.ndarray:
    """Every whole window of the request's text, int64 [n, seqlen]. Takes `say` and raises as
    text_windows does.
    """
    return text_windows(
        model.tokenizer(),
        request.text,
        window_length(model.description.max_context, request.seqlen),
        model.description.sizes["vocab_size"],
        request.option,
        say,
    )


def window_length(max_context: int, asked: int = 0) -> int:
    """Tokens of a window: as many as are asked for; else 2048, or the longest sequence if that is
    shorter.
    """
    return asked or min(2048, max_context)


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
    """Sum of window_losses, in nats."""
    return float(window_losses(session, window).sum())


def window_losses(session: DecoderSession, window: np.ndarray) -> np.ndarray:
    """-log p(token t | tokens before it) of tokens 1..L-1 of one window [L], in nats, fp64 [L-1].

    The window goes through the decoder in pieces with the KV cache, so that memory holds one
    piece's logits.
    """
    import numpy as np

    losses: list[np.ndarray] = []
    for start in range(0, len(window) - 1, session.max_tokens):
        end = min(start + session.max_tokens, len(window) - 1)
        logits = session.run(window[None, start:end], reset=start == 0)[0]  # [S, V] fp32
        largest = logits.max(-1)
        log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64))
        losses.append(log_sum - logits[np.arange(end - start), window[start + 1 : end + 1]])
    return np.concatenate(losses)


def score(
    session: DecoderSession,
    model: Model,
    request: EvalRequest,
    progress: Progress | None = None,
    saved: SavedResults | None = None,
) -> dict[str, Any]:
    """Score a text, window by window.

    Args:
        session: the decoder.
        model: that it runs.
        request: the text and its windows.
        progress: moved by every window that is scored.
        saved: keeps the loss of every window.

    Returns:
        {"ppl", "windows", "runner", "seqlen", "tokens", "seconds"}, tokens being the predicted ones.

    Raises:
        InputError: the text or the numbers are wrong. CheckError: the model computes NaN.
    """
    progress, saved = progress or NullProgress(), saved or SavedResults()
    context = model.description.context
    seqlen = window_length(model.description.max_context, request.seqlen)
    if seqlen > session.max_context:
        rebuild = "" if session.max_context == context else ", or export with a larger --max-seq"
        raise InputError(
            "--seqlen",
            f"got {seqlen}, expected at most {session.max_context}, the context with "
            f"{model.runner.name}",
            f"Give a smaller --seqlen{rebuild}",
        )
    windows = whole_windows(model, request, progress.message)
    chosen = select_windows(len(windows), request.windows, request.first)
    progress.start("eval", len(chosen))
    total, ppl, began = 0.0, math.nan, time.monotonic()

    def scored(index: int, before: float, tokens: int) -> float:
        nll = window_nll(session, windows[index])
        progress.advance(1, f"perplexity {_perplexity(before + nll, tokens, index):.4f}")
        return nll

    for done, index in enumerate(chosen, 1):
        tokens = done * (seqlen - 1)
        total += saved.once(f"perplexity {index}", float, partial(scored, index, total, tokens))
        ppl = _perplexity(total, tokens, index)
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
