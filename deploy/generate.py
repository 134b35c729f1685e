"""python -m deploy generate: continues a prompt token by token and prints the text as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.command import Command, add_runner
from deploy.sampling import Sampler, Sampling, SamplingOptions
from exporter.run.model import AUTO, find_model
from plugins.cli import number, whole_number
from plugins.errors import InputError

if TYPE_CHECKING:
    from exporter.run.sessions import DecoderSession

__all__ = [
    "COMMAND",
    "GenerateRequest",
    "TextStream",
    "generate_text",
    "generate_tokens",
    "prompt_tokens",
]

# Decoded together with new ones, so that spaces and multi-token characters come out right.
_CONTEXT_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What to generate.

    Attributes:
        prompt: the text to continue.
        max_new_tokens: most tokens to add; generation also ends at the model's end token and at its
            context.
        runner: "auto" or a name of exporter/run.
        sampling: how tokens are chosen, where not as the model's makers say.
        stream: print tokens as they come rather than all at the end.
    """

    prompt: str
    max_new_tokens: int = 128
    runner: str = AUTO
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
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


def prompt_tokens(tokenizer: Any, prompt: str, vocab: int) -> list[int]:
    """The prompt's tokens, with the special tokens that the model expects in front.

    Raises:
        InputError: it is empty or not text, or has a token that the model, whose embedding has
            `vocab` rows, does not know.
    """
    from calibration.data import check_tokens

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
    check_tokens(tokenizer, tokens, vocab, "--prompt")
    return tokens


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
            "Give a shorter prompt, or export with a larger --max-seq",
        )
    text = list(prompt)
    logits = session.run(np.array([prompt], np.int64), reset=True, last_only=True)
    for count in range(1, limit + 1):
        token = sampler.choose(logits[0, -1], text)
        text.append(token)
        yield token
        if count < limit:
            logits = session.run(np.array([[token]], np.int64), last_only=True)


def generate_text(out: Path, request: GenerateRequest) -> int:
    """Print the prompt and its continuation on stdout, the speed on stderr; returns the number of
    new tokens.

    Raises:
        InputError: OUT, the prompt or the runner is wrong. CheckError: the model computes NaN.
    """
    model = find_model(out, request.runner)
    sampling = request.sampling.over(model.description.sampling)
    if note := _own_way(request.sampling, sampling):
        print(note, file=sys.stderr)
    sampler = Sampler(sampling)
    with model.open() as session:
        tokenizer = model.tokenizer()
        vocab = model.description.sizes["vocab_size"]
        prompt = prompt_tokens(tokenizer, request.prompt, vocab)
        text, count, began = TextStream(tokenizer, prompt), 0, time.monotonic()
        pieces, full = [request.prompt], False
        _show(pieces, request.stream)
        for token in generate_tokens(session, prompt, sampler, request.max_new_tokens):
            if token in model.description.eos_token_ids:
                break
            count += 1
            pieces.append(text.feed(token))
            _show(pieces, request.stream)
        else:
            full = len(prompt) + count == session.max_context
        pieces.append(text.flush())
    seconds = time.monotonic() - began
    print("".join(pieces), flush=True)
    print(f"{count} tokens in {seconds:.1f} s, {model.runner.name}", file=sys.stderr)
    if full and count < request.max_new_tokens:
        print(_full(session.max_context, model.description.context), file=sys.stderr)
    return count


def _show(pieces: list[str], stream: bool) -> None:
    if stream:
        print("".join(pieces), end="", flush=True)
        pieces.clear()


def _full(limit: int, context: int) -> str:
    longer = "" if limit == context else ", or export with a larger --max-seq"
    return f"The context of {limit} tokens is full, so the text ends here: give a shorter prompt{longer}."


def _own_way(asked: SamplingOptions, sampling: Sampling) -> str:
    """What of the sampling is the model's own and makes a difference; "" for nothing."""
    taken = [
        f"{name.replace('_', ' ')} {getattr(sampling, name):g}"
        for name in ("temperature", "top_k", "top_p", "repetition_penalty")
        if getattr(asked, name) is None and getattr(sampling, name) != getattr(Sampling(), name)
    ]
    if not taken:
        return ""
    greedy = "; --temperature 0 takes the best token" if sampling.temperature else ""
    return f"Of the model's generation_config.json: {', '.join(taken)}. Options change it{greedy}."


class Generate(Command):
    """Prints the text on stdout."""

    name = "generate"
    takes_packs = True
    help = "continue a prompt"
    description = "Print a prompt and its continuation."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The prompt, how tokens are chosen, which runner."""
        add = parser.add_argument
        add("--prompt", required=True, metavar="TEXT", help="the text to continue")
        add(
            "--max-new-tokens",
            type=whole_number(1),
            default=128,
            metavar="N",
            help="most tokens to add (default 128)",
        )
        add_runner(parser, default=AUTO)
        add(
            "--temperature",
            type=number(0),
            metavar="T",
            help="0: always the best token; 1: the model's own odds; this and the next three: as "
            "the model's generation_config.json says (default, where it says nothing: 0)",
        )
        add(
            "--top-k",
            type=whole_number(0),
            metavar="K",
            help="draw among the K best only; 0: all",
        )
        add(
            "--top-p",
            type=number(0),
            metavar="P",
            help="draw among the fewest tokens that are this likely together; 1: all",
        )
        add(
            "--repetition-penalty",
            type=number(0),
            metavar="R",
            help="makes tokens less likely that the text has already; 1: none",
        )
        add("--seed", type=whole_number(0), default=0, metavar="S", help="of the draws (default 0)")
        add(
            "--stream",
            action=argparse.BooleanOptionalAction,
            help="print tokens as they come (default: on a terminal)",
        )

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Generate and print."""
        request = GenerateRequest(
            prompt=args.prompt,
            max_new_tokens=args.max_new_tokens,
            runner=args.runner,
            sampling=SamplingOptions(
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                repetition_penalty=args.repetition_penalty,
                seed=args.seed,
            ),
            stream=sys.stdout.isatty() if args.stream is None else args.stream,
        )
        generate_text(out, request)


COMMAND = Generate()
