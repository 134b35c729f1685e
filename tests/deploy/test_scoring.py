"""Log-likelihoods and continuations, against sums over all logits of a model that remembers all it read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.scoring import Scorer, rolling_windows
from exporter.run.model import find_model
from plugins.errors import InputError

VOCAB, START, END = 30, 28, 29


class Remembers:
    """Logits that depend on every token so far and on their order."""

    max_context = 12

    def __init__(self) -> None:
        self.table = np.random.default_rng(1).normal(size=(97, VOCAB)).astype(np.float32) * 3
        self.read: list[int] = []
        self.fed = 0

    def reset(self) -> None:
        self.read = []

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        state = 0
        for token in tokens:
            state = (state * 31 + token + 1) % 97
        return self.table[state]

    def run(self, ids: np.ndarray, reset: bool = False, last_only: bool = False) -> np.ndarray:
        if reset:
            self.reset()
        rows = []
        for token in ids[0].tolist():
            self.read.append(token)
            rows.append(self.logits(self.read))
        self.fed += len(rows)
        assert len(self.read) <= self.max_context
        return np.stack(rows[-1:] if last_only else rows)[None]

    def log_p(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        total, best, read = 0.0, True, list(context)
        for token in continuation:
            row = self.logits(read).astype(np.float64)
            total += row[token] - np.log(np.exp(row).sum())
            best = best and int(row.argmax()) == token
            read.append(token)
        return total, best


class Letters:
    """A letter a token; "ab" is one of its own, so that what is encoded together differs."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        marked = text.replace("ab", "\x01")
        known = {"\x01": 27, " ": 26}
        return {"input_ids": [known.get(letter, ord(letter) - 97) for letter in marked]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join({27: "ab", 26: " "}.get(token, chr(token + 97)) for token in tokens)


def scorer(session: Any, **options: Any) -> Scorer:
    return Scorer(session, Letters(), (END,), START, **options)


def test_pairs_are_cut_where_the_whole_text_is() -> None:
    made = scorer(Remembers())
    assert made.pair("cd", "ef") == ([2, 3], [4, 5])
    assert made.pair("cd ", "ef") == made.pair("cd", " ef") == ([2, 3], [26, 4, 5])
    assert made.pair("", "ef") == ([START], [4, 5])
    assert made.pair("  ", "e") == ([START], [26, 26, 4])
    assert scorer(Remembers(), add_bos=True).pair("c", "d") == ([START, 2], [3])
    assert scorer(Remembers(), add_bos=True).pair("", "cd") == ([START], [2, 3])


def test_loglikelihoods_are_those_of_every_logit() -> None:
    session = Remembers()
    likeliest = chr(int(session.logits([2, 3]).argmax()) + 97)
    pairs = [
        ("cd", "e"),
        ("cd", "f"),
        ("cd", "efg"),
        ("cd", "gh"),
        ("cd", "h"),
        ("", "abc"),
        ("cd", likeliest),
    ]
    got = scorer(session).loglikelihood(pairs)
    encode = scorer(session).pair
    for pair, (log_p, same) in zip(pairs, got, strict=True):
        wanted, best = session.log_p(*encode(*pair))
        assert log_p == pytest.approx(wanted) and same == best, pair
    assert got[-1][1] and not all(same for _, same in got)


def test_a_context_is_read_once_for_choices_of_one_token() -> None:
    session = Remembers()
    scorer(session).loglikelihood([("cdefg", letter) for letter in "hijk"])
    assert session.fed == 5


def test_the_end_of_a_long_text_counts() -> None:
    session = Remembers()
    made = scorer(session)
    context, continuation = list(range(10)), list(range(10, 16))
    whole = [*context, *continuation][-13:]
    assert made.score(context, continuation) == pytest.approx(session.log_p(whole[:7], whole[7:]))
    assert made.score([1], list(range(20))) == pytest.approx(session.log_p([7], list(range(8, 20))))
    assert made.score([1], []) == (0.0, True)


@pytest.mark.parametrize(
    ("count", "windows"),
    [
        (0, []),
        (3, [([99], [0, 1, 2])]),
        (4, [([99], [0, 1, 2, 3])]),
        (10, [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]),
    ],
)
def test_rolling_windows(count: int, windows: list[tuple[list[int], list[int]]]) -> None:
    assert list(rolling_windows(list(range(count)), 99, 4)) == windows


def test_rolling_predicts_each_token_once() -> None:
    session, text = Remembers(), "thequickbrownfoxjumpsoverthelazydog"
    tokens = scorer(session).encode(text)
    wanted = sum(session.log_p(*window)[0] for window in rolling_windows(tokens, START, 12))
    assert scorer(session).rolling([text, ""]) == [pytest.approx(wanted), 0.0]
    # The first token stands in front of a text and is not predicted itself.
    assert scorer(session, add_bos=True).rolling([text, ""]) == [pytest.approx(wanted), 0.0]


def test_continuations_end_where_they_are_told_to() -> None:
    session, calls = Remembers(), []
    session.table[:, END] = -100
    made = scorer(session, each=lambda: calls.append(1))
    whole = made.generate([("cd", {"max_gen_toks": 8})])[0]
    assert 8 <= len(whole) <= 16
    assert made.generate([("cd", {"until": "", "max_gen_toks": 8})]) == [whole]
    middle = whole[2:4]
    cut = whole[: whole.index(middle)]
    assert made.generate([("cd", {"until": [middle, "zzz"], "max_gen_toks": 8})]) == [cut]
    assert made.generate([("cd", {"until": middle, "max_gen_toks": 8, "do_sample": False})]) == [
        cut
    ]
    assert len(calls) == 4
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 20, "max_gen_toks": 8}
    assert made.generate([("cd", dict(drawn))]) == made.generate([("cd", dict(drawn))]) != [whole]
    # The end of a context that is too long is continued.
    assert made.generate([("x" * 50 + "cdef", {"max_gen_toks": 8})]) == made.generate(
        [("cdef", {"max_gen_toks": 8})]
    )


def test_an_end_token_ends_it() -> None:
    session = Remembers()
    session.table[:, END] = 100
    assert scorer(session).generate([("cd", {})]) == [""]


def test_what_it_refuses() -> None:
    with pytest.raises(InputError) as error:
        scorer(Remembers()).generate([("a", {"min_length": 3})])
    assert str(error.value) == (
        "generation_kwargs: got min_length, expected until, max_gen_toks, do_sample, temperature, top_k "
        "or top_p. Choose another task, or leave the field out of its file."
    )
    with pytest.raises(InputError) as error:
        scorer(Remembers()).generate([("a", {"max_gen_toks": "many"})])
    assert str(error.value) == (
        "generation_kwargs, max_gen_toks: got 'many', expected a number. Correct the task's file."
    )
    with pytest.raises(InputError) as error:
        scorer(Remembers()).generate([("a", {"max_gen_toks": 12})])
    assert str(error.value) == (
        "max_gen_toks: got 12, expected less than the context of 12. Export with a larger --max-seq, or "
        "choose a task with shorter answers."
    )
    with pytest.raises(InputError) as error:
        Scorer(Remembers(), Letters(), (), None)  # type: ignore[arg-type]
    assert str(error.value).startswith("the model: got neither a first nor an end token, expected ")


def test_on_an_artifact(artifact: Path) -> None:
    model = find_model(artifact, "native")
    about, tokenizer = model.description, model.tokenizer()
    with model.open() as session:
        made = Scorer(session, tokenizer, about.eos_token_ids, about.bos_token_id)
        context, continuation = made.pair("The river was", " wide and slow")
        got = made.score(context, continuation)[0]
        ids = np.array([[*context, *continuation]])
        logits = session.run(ids, reset=True)[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(context) - 1, ids.shape[1] - 1)
    assert got == pytest.approx(logits[rows, continuation].sum(), rel=1e-3)
