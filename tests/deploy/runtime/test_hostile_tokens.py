"""A damaged tokenizer.json: an error, or what the library makes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tests.deploy.runtime.token_cases import STYLES, AnswerError, Answers

TEXTS = (
    "Hello  world, it's 12345 é à ▁x\n\n  y",
    "<s>x</s> <|end|>y word  left right",
    "漢字 🙂 \u1100\u1161\u11a8 ﬁ",
    "   ",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 3, -1, 1.5, "", "a", " ", "▁", "é", "<s>", [], {}, ["a"]),
    *("Isolated", "Removed", "never", "first", {"type": "Fuse"}, {"type": "NFC"}),
    *({"type": "ByteLevel"}, {"String": " "}, {"Regex": "\\s+"}),
)


def small(style: str) -> dict[str, Any]:
    """A tokenizer.json of 340 tokens."""
    file: dict[str, Any] = json.loads(STYLES[style]().to_str())
    model = file["model"]
    kept = sorted(model["vocab"], key=model["vocab"].get)[:340]
    model["vocab"] = {token: index for index, token in enumerate(kept)}
    model["merges"] = [
        pair for pair in model["merges"] if {*pair, "".join(pair)} <= set(model["vocab"])
    ]
    beyond = iter(range(340, 1000))
    for token in file["added_tokens"]:
        if token["content"] not in model["vocab"]:
            token["id"] = next(beyond)
    return file


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but single tokens and merges, and what is not followed."""
    if path[:1] in (("truncation",), ("padding",)):
        return
    if path:
        yield path
    if path[:2] in (("model", "vocab"), ("model", "merges")):
        return
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, name))


def damage(file: dict[str, Any], choose: random.Random) -> str:
    copy = json.loads(json.dumps(file))
    for _ in range(choose.randrange(1, 3)):
        *parents, last = choose.choice(list(places(copy)))
        inside: Any = copy
        for name in parents:
            inside = inside[name]
        if choose.random() < 0.25:
            del inside[last]
        else:
            inside[last] = choose.choice(VALUES)
    return json.dumps(copy)


def test_damage_is_an_error_or_what_the_library_makes_of_it(answers: Answers) -> None:
    from tokenizers import Tokenizer

    choose = random.Random(0)
    files = [small(style) for style in ("smollm2", "qwen", "llama2", "metaspace")]
    counts = {"refused": 0, "the same": 0}
    for _ in range(400):
        text = damage(choose.choice(files), choose)
        try:
            answers.ask(parse=text)
        except AnswerError:
            counts["refused"] += 1
            continue
        try:
            theirs = Tokenizer.from_str(text)
        except BaseException:  # a panic of Rust is no Exception
            continue
        for one in TEXTS:
            try:
                wanted = theirs.encode(one).ids
                whole = theirs.decode(wanted)
            except BaseException:
                continue
            assert answers.encode(one) == wanted, text[-2000:]
            assert answers.ask(decode=wanted) == whole, text[-2000:]
        counts["the same"] += 1
    assert min(counts.values()) > 30, counts
