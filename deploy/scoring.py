"""Log-likelihoods of texts, and continuations up to stop strings, as benchmarks of language models ask for
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from deploy.generate import TextStream, generate_tokens
from deploy.sampling import Sampler, Sampling
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from exporter.run.sessions import DecoderSession

__all__ = ["Scorer", "rolling_windows"]

Tokens = list[int]
Number = TypeVar("Number", int, float)
_MAX_NEW = 256  # tokens of a continuation where a request does not say, or half of a short context
# Fields of a request for text that change nothing here: greedy decoding has one beam and one result.
_PASSED_OVER = ("num_beams", "num_return_sequences", "use_cache", "pad_token_id", "eos_token_id")


class Scorer:
    """Scores and continues texts with a session, one sequence at a time.

    Args:
        session: of the model.
        tokenizer: of transformers.
        ends: the model's end tokens.
        bos: its first token; None of a model without.
        add_bos: whether texts begin with it; where nothing is in front of a text, it, or else an end
            token, stands there always.
        each: called after each request.

    Raises:
        InputError: the model has neither a first nor an end token.
    """

    def __init__(
        self,
        session: DecoderSession,
        tokenizer: Any,
        ends: Sequence[int],
        bos: int | None,
        add_bos: bool = False,
        each: Callable[[], None] = lambda: None,
    ) -> None:
        start = bos if bos is not None else next(iter(ends), None)
        if start is None:
            raise InputError(
                "the model",
                "got neither a first nor an end token, expected one to put in front of a text",
                "Export a checkpoint whose config names bos_token_id or eos_token_id",
            )
        self._session, self._tokenizer, self._ends = session, tokenizer, frozenset(ends)
        self._start, self._add_bos, self._each = start, add_bos, each
        self._context: Tokens = []  # the last one that something was scored behind ...
        self._next: np.ndarray | None = (
            None  # ... what follows it, [1, vocab] log-probabilities ...
        )
        self._ready = False  # ... and whether the session's cache ends with it

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, without special ones but the first, if that was asked for."""
        found = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [int(token) for token in found]
        return [self._start, *tokens] if self._add_bos and tokens[:1] != [self._start] else tokens

    def pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """The tokens of both, as they lie in the whole text: spaces at a context's end belong to what
        follows.
        """
        if not context:
            tokens = self.encode(continuation)
            if tokens[:1] == [self._start]:
                return tokens[:1], tokens[1:]
            return [self._start], tokens
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context)
        return before or [self._start], self.encode(context + continuation)[len(before) :]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of continuations behind contexts: log p in nats, and whether each token is the likeliest."""
        found = []
        for context, continuation in pairs:
            found.append(self.score(*self.pair(context, continuation)))
            self._each()
        return found

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p in nats of whole texts, in windows of the context that do not overlap."""
        found = []
        for text in texts:
            start, tokens = self.pair("", text)
            windows = rolling_windows(tokens, start[0], self._session.max_context)
            found.append(sum(self.score(*window)[0] for window in windows))
            self._each()
        return found

    def score(self, context: Tokens, continuation: Tokens) -> tuple[float, bool]:
        """log p of tokens behind others, and whether each is the likeliest; of a sequence that is too
        long the end counts.
        """
        import numpy as np

        if not continuation:
            return 0.0, True
        # The last token is not fed.
        whole = [*context, *continuation][-self._session.max_context - 1 :]
        count = min(len(continuation), len(whole) - 1)
        context, continuation = whole[:-count], whole[-count:]
        rows = self._next if self._context == context else None
        if rows is None or (count > 1 and not self._ready):
            rows = self._read(context)
        if count > 1:
            more = self._log_probabilities(continuation[:-1])
            rows, self._ready = np.concatenate([rows, more]), False
        same = rows.argmax(-1) == np.array(continuation)
        return float(rows[np.arange(count), continuation].sum()), bool(same.all())

    def _read(self, context: Tokens) -> np.ndarray:
        self._session.reset()
        self._next = found = self._log_probabilities(context, last_only=True)
        self._context, self._ready = context, True
        return found

    def _log_probabilities(self, tokens: Tokens, last_only: bool = False) -> np.ndarray:
        """Of what follows each token, [S, vocab] fp64; of the last one alone [1, vocab]."""
        import numpy as np

        ids = np.array([tokens], np.int64)
        logits: np.ndarray = self._session.run(ids, last_only=last_only)[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continuations of contexts.

        Args:
            requests: (context, fields): "until", a text or several that end a continuation and are no
                part of it; "max_gen_toks"; "do_sample" with "temperature", "top_k" and "top_p".

        Raises:
            InputError: another field, or a number out of range.
        """
        found = []
        for context, fields in requests:
            found.append(self._continued(context, dict(fields)))
            self._each()
        return found

    def _continued(self, context: str, fields: dict[str, Any]) -> str:
        context_size = self._session.max_context
        stops, limit, sampling = _fields(fields, min(_MAX_NEW, context_size // 2))
        room = context_size - limit
        if room < 1:
            raise InputError(
                "max_gen_toks",
                f"got {limit}, expected less than the context of {context_size}",
                "Export with a larger --max-seq, or choose a task with shorter answers",
            )
        prompt = (self.encode(context) or [self._start])[-room:]
        self._next = None
        stream, text = TextStream(self._tokenizer, prompt), ""
        for token in generate_tokens(self._session, prompt, Sampler(sampling), limit):
            if token in self._ends:
                break
            text += stream.feed(token)
            if any(stop in text for stop in stops):
                break
        else:
            text += stream.flush()
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _fields(fields: dict[str, Any], limit: int) -> tuple[list[str], int, Sampling]:
    """Stop strings, most tokens, by default `limit`, and how they are chosen."""
    until = fields.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    limit = _number(int, fields, "max_gen_toks", limit)
    temperature = _number(float, fields, "temperature", 1.0)
    top_k, top_p = _number(int, fields, "top_k", 0), _number(float, fields, "top_p", 1.0) or 1.0
    for name in _PASSED_OVER:
        fields.pop(name, None)
    drawn = bool(fields.pop("do_sample", False)) and temperature > 0
    if fields:
        raise InputError(
            "generation_kwargs",
            f"got {min(fields)}, expected until, max_gen_toks, do_sample, temperature, top_k or top_p",
            "Choose another task, or leave the field out of its file",
        )
    return stops, limit, Sampling(temperature, top_k, 0, top_p) if drawn else Sampling()


def _number(
    kind: Callable[[Any], Number], fields: dict[str, Any], name: str, usual: Number
) -> Number:
    """A field that is taken out; null is 0."""
    value = fields.pop(name, usual)
    try:
        return kind(value or 0)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"generation_kwargs, {name}",
            f"got {value!r}, expected a number",
            "Correct the task's file",
        ) from None


def rolling_windows(tokens: Tokens, start: int, length: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Cut a text so that each token is predicted once, with as much in front of it as fits.

    Args:
        tokens: of the text.
        start: stands in front of the first one.
        length: most tokens that are fed together.

    Yields:
        A context and the tokens that follow it.
    """
    if tokens:
        yield [start], tokens[:length]
    for done in range(length, len(tokens), length):
        end = min(done + length, len(tokens))
        yield tokens[end - length - 1 : done], tokens[done:end]
