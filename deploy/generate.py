"""Continues a prompt token by token and turns the tokens into text as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifact import open_artifact
from deploy.sampling import Sampler, Sampling
from plugins.errors import InputError

if TYPE_CHECKING:
    from exporter.run.sessions import DecoderSession

__all__ = [
    "GenerateRequest",
    "TextStream",
    "generate_text",
    "generate_tokens",
    "prompt_tokens",
    "stop_tokens",
]

_CONTEXT_TOKENS = (
    6  # decoded together with new ones, so that spaces and multi-token characters come out right
)


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate.

    Attributes:
        prompt: the text to continue.
        max_new_tokens: most tokens to add; generation also ends at the model's end token and at its
            context.
        runner: "auto", "onnxruntime" or "tensorrt".
        sampling: how tokens are chosen.
        stream: print tokens as they come rather than all at the end.
    """

    prompt: str
    max_new_tokens: int = 128
    runner: str = "auto"
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = False


class TextStream:
    """Tokens in, text out; holds back a character until all of its tokens are there.

    Args:
        tokenizer: of transformers.
        prompt: tokens in front of the first one fed.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._shown = len(self._tokens)  # tokens whose text is out

    def feed(self, token: int) -> str:
        """The text that this token completes, often one word, or ""."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # a character cut in the middle
            return ""
        self._tokens = self._tokens[-_CONTEXT_TOKENS:]
        self._shown = len(self._tokens)
        return text

    def flush(self) -> str:
        """What is held back."""
        return self._new_text()

    def _new_text(self) -> str:
        old, new = self._decode(self._tokens[: self._shown]), self._decode(self._tokens)
        return new[len(old) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, with the special tokens that the model expects in front.

    Raises:
        InputError: it is empty or not text.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "--prompt",
            "got bytes that are not UTF-8, expected text",
            "Check the terminal's encoding",
        ) from None
    tokens = (
        [int(token) for token in tokenizer(prompt, verbose=False)["input_ids"]] if prompt else []
    )
    if not tokens:
        raise InputError(
            "--prompt",
            "got an empty text, expected at least one word",
            'Give some: --prompt "Once upon a time"',
        )
    return tokens


def stop_tokens(config: dict[str, Any]) -> frozenset[int]:
    """The model's end tokens, of quant.json's config."""
    eos = config.get("eos_token_id")
    return frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])


def generate_tokens(
    session: DecoderSession, prompt: Sequence[int], sampler: Sampler, limit: int
) -> Iterator[int]:
    """Up to `limit` new tokens, fewer if the context ends: one prefill, then one decode step per
    token.
    """
    import numpy as np

    limit = min(limit, session.max_context - len(prompt))
    if limit < 1:
        raise InputError(
            "--prompt",
            f"got {len(prompt)} tokens, expected fewer than the context of {session.max_context}",
            "Give a shorter prompt, or build the engine with a larger --max-seq",
        )
    logits = session.run(np.array([prompt], np.int64), reset=True, last_only=True)
    for count in range(1, limit + 1):
        token = sampler.choose(logits[0, -1])
        yield token
        if count < limit:
            logits = session.run(np.array([[token]], np.int64), last_only=True)


def generate_text(out: Path, request: GenerateRequest) -> int:
    """Print the prompt and its continuation on stdout, the speed on stderr; returns the number of
    new tokens.

    Raises:
        InputError: OUT, the prompt or the runner is wrong. CheckError: the model computes NaN.
    """
    sampler = Sampler(request.sampling)
    quant, session, runner = open_artifact(out, request.runner)
    with session:
        tokenizer, stop = quant.tokenizer(), stop_tokens(quant.config)
        prompt = prompt_tokens(tokenizer, request.prompt)
        text, count, began = TextStream(tokenizer, prompt), 0, time.monotonic()
        pieces = [request.prompt]
        _show(pieces, request.stream)
        for token in generate_tokens(session, prompt, sampler, request.max_new_tokens):
            if token in stop:
                break
            count += 1
            pieces.append(text.feed(token))
            _show(pieces, request.stream)
        pieces.append(text.flush())
    seconds = time.monotonic() - began
    print("".join(pieces), flush=True)
    print(f"{count} tokens in {seconds:.1f} s, {runner}", file=sys.stderr)
    return count


def _show(pieces: list[str], stream: bool) -> None:
    if stream:
        print("".join(pieces), end="", flush=True)
        pieces.clear()
