"""The tokenizer in C++ gives what Hugging Face's tokenizers library gives."""

from __future__ import annotations

import functools
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.deploy.runtime.token_cases import (
    STYLES,
    AnswerError,
    Answers,
    byte_level,
    source_code,
    torture,
)

WIKITEXT = REPOSITORY.parent / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"
FIX = "Take the model's own tokenizer.json, or one of a family in docs/tokenizer.md"


@pytest.fixture(scope="module")
def trained() -> Callable[[str], Any]:
    """make(style) -> tokenizers.Tokenizer, each trained once."""
    return functools.cache(lambda style: STYLES[style]())


def parsed(answers: Answers, tokenizer: Any) -> Any:
    answers.ask(parse=tokenizer.to_str())
    return tokenizer


def check_text(answers: Answers, tokenizer: Any, text: str) -> None:
    """Tokens, and what they become again: at once and one by one."""
    for special in (True, False):
        wanted = tokenizer.encode(text, add_special_tokens=special).ids
        assert answers.encode(text, special) == wanted, ascii(text[:200])
    for skip in (True, False):
        whole = tokenizer.decode(wanted, skip_special_tokens=skip)
        assert answers.ask(decode=wanted, skip=skip) == whole
        assert "".join(answers.ask(stream=wanted, skip=skip)) == whole


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_the_librarys(style: str, answers: Answers, trained: Any) -> None:
    tokenizer = parsed(answers, trained(style))
    for text in [*torture(), source_code()]:
        check_text(answers, tokenizer, text)


@pytest.mark.parametrize("style", STYLES)
def test_the_bytes_of_tokens_are_the_texts(style: str, answers: Answers, trained: Any) -> None:
    """Also where a token is a part of a character."""
    tokenizer = parsed(answers, trained(style))
    parts = 0
    for text in [*torture(60), "ab \U0001f9ff\U0001f9ff c", source_code()[:5000]]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        raw = [bytes.fromhex(one) for one in answers.ask(bytes=ids)]
        whole = tokenizer.decode(ids, skip_special_tokens=False).encode()
        assert b"".join(raw) in (whole, b" " + whole), ascii(text[:200])
        parts += any(b"\xf0" <= one[-1:] < b"\xf8" for one in raw)
    assert parts > 0 or style == "metaspace"  # which has no bytes
    assert answers.ask(bytes=[-1, 10**6]) == ["", ""]


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen", "llama2", "mistral"])
def test_wikitext(style: str, answers: Answers, trained: Any) -> None:
    if not WIKITEXT.is_file():
        pytest.skip(f"there is no {WIKITEXT.relative_to(REPOSITORY.parent)} beside the project")
    tokenizer = parsed(answers, trained(style))
    text = WIKITEXT.read_text(encoding="utf-8")[:150_000]
    assert answers.encode(text) == tokenizer.encode(text).ids


@pytest.mark.slow
def test_the_demo_models_own_tokenizer(demo_gguf: Path, answers: Answers, tmp_path: Path) -> None:
    """SmolLM2's, with its real vocabulary, from a file."""
    from calibration.checkpoints.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(str(demo_gguf), offline=True).tokenizer().backend_tokenizer
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert answers.ask(load=str(path)) == 49152
    for text in [*torture(200), source_code(), "<|im_start|>user\nHi<|im_end|>\n"]:
        check_text(answers, tokenizer, text)


@pytest.mark.parametrize("style", STYLES)
def test_any_tokens_become_the_librarys_text(style: str, answers: Answers, trained: Any) -> None:
    """In any order, so that characters break off and bytes make none; ids that nobody has."""
    tokenizer = parsed(answers, trained(style))
    choose = random.Random(3)
    broken = 0
    for _ in range(150):
        ids = [
            choose.randrange(tokenizer.get_vocab_size() + 3) for _ in range(choose.randrange(12))
        ]
        whole = tokenizer.decode(ids)
        assert answers.ask(decode=ids) == whole
        parts = answers.ask(stream=ids)
        if "\ufffd" in whole:  # a run of bytes that is no text: what was given stays given
            broken += 1
        else:
            assert "".join(parts) == whole
    assert broken < 150


@pytest.mark.parametrize("style", ["gpt2", "llama2"])
def test_a_stream_never_splits_a_character(style: str, answers: Answers, trained: Any) -> None:
    text = "漢字 \U0001f600é\u0301 x" * 5
    tokenizer = parsed(answers, trained(style))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)  # characters of several tokens
    parts = answers.ask(stream=ids)
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)
    assert parts[-1] == "" and sum(map(bool, parts)) > len(text) / 2  # nothing waits for the end
    # Half a character at the end is said so there, and not before.
    cut = answers.ask(stream=ids[: len(answers.encode("漢", False)) - 1])
    assert not any("\ufffd" in part for part in cut[:-1]) and "\ufffd" in cut[-1]


@pytest.mark.parametrize(
    "raw", [b"a\xff b", b"\xe2\x82", b"\xed\xa0\x80x", b"\xf4\x90\x80\x80", b"\xc0\xaf\xe2\x28\xa1"]
)
def test_what_is_not_utf8_is_read_as_python_does(
    raw: bytes, answers: Answers, trained: Any
) -> None:
    tokenizer = parsed(answers, trained("gpt2"))
    assert answers.encode(raw) == tokenizer.encode(raw.decode("utf-8", "replace")).ids


def plain(answers: Answers, text: str, *parts: tuple[int, int]) -> Any:
    return answers.ask(encode=text.encode().hex(), plain=parts)


@pytest.mark.parametrize("style", ["gpt2", "llama2", "llama3"])
def test_special_tokens_in_a_plain_stretch_are_text(
    style: str, answers: Answers, trained: Any
) -> None:
    tokenizer = parsed(answers, trained(style))
    special = [
        (id, token.content)
        for id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and not token.normalized
    ]
    assert special
    for id, name in special:
        text = f"{name}Hi{name}you {name[:-1]}{name}"
        begin, end = len(name), len(text) - len(name)
        ids = plain(answers, text, (begin, end))
        assert ids[0] == ids[-1] == id and id not in ids[1:-1]
        assert "".join(tokenizer.decode(ids, skip_special_tokens=False).split()) == "".join(
            text.split()
        )
        assert plain(answers, text) == answers.encode(text, special=False)
        # A token that begins in front of a stretch ends in front of it.
        assert id not in plain(answers, name, (len(name) - 1, len(name)))
        assert id not in plain(answers, name, (0, 1))
        tokenizer.encode_special_tokens = True
        text = f"of {name} and {name}"
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        assert plain(answers, text, (0, len(text))) == wanted
    for text in torture():
        if not any(name in text for _, name in special) and text:
            parts = (0, len(text.encode()))
            assert plain(answers, text, parts) == answers.encode(text, special=False)


def test_special_tokens_of_a_normalized_text_are_refused_in_a_plain_stretch(
    answers: Answers,
) -> None:
    from tokenizers import AddedToken

    tokenizer = STYLES["gpt2"]()
    tokenizer.add_special_tokens([AddedToken("[SAYS]", normalized=True)])
    parsed(answers, tokenizer)
    assert plain(answers, "[SAYS]x", (6, 7))
    with pytest.raises(AnswerError) as error:
        plain(answers, "[SAYS]x[SAYS]", (6, 13))
    assert error.value.args == (
        "text", "got [SAYS], expected no special token", "Take it out of the text",
    )  # fmt: skip
    with pytest.raises(AnswerError) as error:
        answers.ask(encode="ff", plain=[])
    assert error.value.args == (
        "text", "got bytes that are not UTF-8, expected UTF-8", "Encode the text as UTF-8",
    )  # fmt: skip


def test_long_words_take_no_quadratic_time(answers: Answers, trained: Any) -> None:
    """100 000 letters that merge again and again: quadratic time would be hours."""
    for style in ("gpt2", "llama2"):
        tokenizer = parsed(answers, trained(style))
        for text in ("a" * 100_000, "return" * 20_000, " " * 100_000, "▁" * 30_000):
            assert answers.encode(text) == tokenizer.encode(text).ids


def test_unicode_tables_know_every_character(answers: Answers, trained: Any) -> None:
    """Two classes of each rule tell categories apart; NFC, NFD and NFKC take every character."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assigned = "a".join(one for one in every if unicodedata.category(one) not in ("Cn", "Co"))
    for style in ("gpt2", "qwen", "nfkd"):
        tokenizer = parsed(answers, trained(style))
        assert answers.encode(assigned[::7]) == tokenizer.encode(assigned[::7]).ids


def changed(file: dict[str, Any], path: str, value: Any) -> str:
    copy = json.loads(json.dumps(file))
    *parents, last = path.split(".")
    place = copy
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(copy)


PATTERNS = "Use the tokenizer.json of a family that docs/tokenizer.md lists"
LISTED = "expected what deploy/runtime/src/regex.hpp lists"


@pytest.mark.parametrize(
    ("path", "value", "where", "problem"),
    [
        (
            "model.type",
            "Unigram",
            ", model, type",
            "got \"Unigram\", expected BPE, as LLaMA's and Qwen's",
        ),
        (
            "model.dropout",
            0.1,
            ", model, dropout",
            "got 0.1, expected null: nothing is left to chance",
        ),
        (
            "model.vocab",
            [],
            ", model, vocab",
            "got array, expected an object of tokens and their ids",
        ),
        (
            "model.vocab.!",
            -1,
            ", model, vocab, !",
            "got -1, expected a whole number from 0 to 4194303",
        ),
        ("model.vocab.!", 5, ", model, vocab, $", "got 5, expected an id that no other token has"),
        (
            "model.merges.0",
            "a",
            ", model, merges[0]",
            'got "a", expected two tokens with a space between',
        ),
        (
            "model.merges.0",
            ["!", "漢"],
            ", model, merges[0]",
            "got ! and 漢, expected tokens of the vocabulary that make a third",
        ),
        (
            "normalizer",
            {"type": "Lowercase"},
            ", normalizer, type",
            'got "Lowercase", expected a normalizer of Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Strip',
        ),
        (
            "pre_tokenizer",
            {"type": "BertPreTokenizer"},
            ", pre_tokenizer, type",
            'got "BertPreTokenizer", expected a pre-tokenizer of Sequence, Split, ByteLevel, Digits, '
            "Metaspace, WhitespaceSplit",
        ),
        (
            "post_processor",
            {"type": "RobertaProcessing"},
            ", post_processor, type",
            'got "RobertaProcessing", expected a post-processor of Sequence, TemplateProcessing, ByteLevel',
        ),
        (
            "decoder",
            {"type": "CTC"},
            ", decoder, type",
            'got "CTC", expected a decoder of Sequence, ByteLevel, Metaspace, Replace, ByteFallback, '
            "Fuse, Strip",
        ),
        ("added_tokens.0.id", 7, ", added_tokens[0], id", "got 7, expected 0"),
    ],
)
def test_what_is_not_known_is_named(
    path: str, value: Any, where: str, problem: str, answers: Answers, trained: Any
) -> None:
    file = json.loads(trained("gpt2").to_str())
    with pytest.raises(AnswerError) as error:
        answers.ask(parse=changed(file, path, value))
    assert error.value.args == (f"tokenizer.json{where}", problem, FIX)


@pytest.mark.parametrize(
    ("pattern", "got"),
    [
        (r"a(?<=b)", "a (? that is none of (?: (?i: (?= (?! at byte 2"),
        (r"a+?", "a lazy quantifier at byte 2"),
        (r"(a|b)++", "a possessive group at byte 7"),
        (r"\w+", r"\w at byte 2"),
        (r"\p{Han}", r"\p{Han} at byte 7"),
        (r"[a[b]]", "a set in a set at byte 2"),
        (r"(a", "the end of the pattern in a group at byte 2"),
        (r"a)", ") without ( at byte 1"),
        (r"(?i:straße)", "the letters st in (?i: at byte 6"),
        (r"a{2,1}", "a { that is no count at byte 6"),
        (r"(" * 40, "groups deeper than 32 at byte 33"),
    ],
)
def test_a_pattern_that_is_not_known_is_named(
    pattern: str, got: str, answers: Answers, trained: Any
) -> None:
    file = json.loads(trained("llama3").to_str())
    at = "pre_tokenizer.pretokenizers.0.pattern"
    with pytest.raises(AnswerError) as error:
        answers.ask(parse=changed(file, at, {"Regex": pattern}))
    where = "tokenizer.json, pre_tokenizer, pretokenizers[0], pattern, Regex, the pattern "
    assert error.value.args == (where + pattern, f"got {got}, {LISTED}", PATTERNS)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:ab|a)(?:bc|c)?|\d{2,3}|[^\S\n]+|\x41|[\x{61}-f\]-]+",
        r"\P{L}|(?=re)r|(?!re)[a-z]",
        r"(?:\s*x)+|(?:a|b?)*c|\s?+\p{^L}{2}",
        r"(?i:k|don't|x's)|'(?i:s)",
    ],
)
@pytest.mark.parametrize(
    "behavior", ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]
)
@pytest.mark.parametrize("invert", [False, True])
def test_patterns_of_ones_own(pattern: str, behavior: str, invert: bool, answers: Answers) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "re", "ab", "  "])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("r", "e"), ("a", "b")]))
    split = pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    parsed(answers, tokenizer)
    for text in [
        *(text for text in torture(100) if len(text) < 500),
        "abcabbc abacab 12 1234 A]-f re rere x's DON'T '\u017f \u212a  x x c",
    ]:
        assert answers.encode(text) == tokenizer.encode(text).ids, ascii(text)


def random_pattern(choose: random.Random, depth: int = 0) -> str:
    def atom() -> str:
        if depth > 2 or choose.random() < 0.6:
            return choose.choice(
                [*"abcx ", r"\s", r"\p{L}", "[ab]", "[^a]", r"\d", r"[^\s\p{L}]", ".", r"\S"]
            )
        group = choose.choice(["(?:%s)", "(%s)", "(?=%s)", "(?!%s)"])
        return group % random_pattern(choose, depth + 1)

    def sequence() -> str:
        atoms = [atom() for _ in range(choose.randrange(1, 4))]
        counts = "", "", "", "?", "*", "+", "{1,2}", "{2}", "{1,}"
        return "".join(
            one + ("" if one[:3] in ("(?=", "(?!") else choose.choice(counts)) for one in atoms
        )

    return "|".join(sequence() for _ in range(choose.randrange(1, 3)))


def test_random_patterns_match_as_in_oniguruma(answers: Answers) -> None:
    """Groups in loops, empty matches and lookahead; what a pattern leaves are the tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    choose = random.Random(11)
    vocab = {token: index for index, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    same = 0
    for _ in range(250):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        pattern = random_pattern(choose)
        try:
            split = pre_tokenizers.Split(Regex(pattern), "removed")
        except Exception:  # Oniguruma refuses it
            continue
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        parsed(answers, tokenizer)
        for _ in range(5):
            text = "".join(choose.choices("aabbc x1é\n", k=choose.randrange(14)))
            try:
                found = answers.encode(text)
            except AnswerError:  # of patterns that explode
                continue
            assert found == tokenizer.encode(text).ids, (pattern, text)
            same += 1
    assert same > 1000


def test_a_pattern_that_explodes_is_an_error(answers: Answers, trained: Any) -> None:
    file = json.loads(trained("llama3").to_str())
    at = "pre_tokenizer.pretokenizers.0.pattern"
    answers.ask(parse=changed(file, at, {"Regex": "(?:a|aa|aaa)+b"}))
    with pytest.raises(AnswerError) as error:
        answers.encode("a" * 200)
    assert error.value.args == (
        "tokenizer.json, pre_tokenizer, pretokenizers[0], pattern, Regex, the pattern (?:a|aa|aaa)+b",
        "got a text on which it takes more than 2000 steps for each byte, expected fewer",
        "Leave the text out, or use a tokenizer.json with another pattern",
    )
    assert len(answers.encode("b")) == 2  # bos; the next text is none the worse


def test_no_file_and_no_json(answers: Answers, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content, problem in (
        (None, "got no file (No such file or directory), expected one that can be read"),
        ("[1]", "got array, expected an object"),
    ):
        if content:
            path.write_text(content)
        with pytest.raises(AnswerError) as error:
            answers.ask(load=str(path))
        assert error.value.args == (str(path), problem, FIX)
    with pytest.raises(AnswerError, match="got no JSON"):
        answers.ask(parse='{"model": ')


def test_a_copy_of_the_alphabet_is_not_needed(answers: Answers) -> None:
    """Bytes that no token spells are left out, or are the unknown token, as in the library."""
    from tokenizers import Tokenizer

    file = json.loads(byte_level().to_str())
    file["model"]["merges"] = []
    vocab = file["model"]["vocab"]
    file["model"]["vocab"] = {
        token: number for token, number in vocab.items() if token not in ("a", "b", "Ã")
    }
    for unknown, fuse in ((None, False), ("c", False), ("c", True)):
        file["model"] |= {"unk_token": unknown, "fuse_unk": fuse}
        tokenizer = parsed(answers, Tokenizer.from_str(json.dumps(file)))
        for text in ("abc", "aab bä c", "bbb", "xaa"):
            assert answers.encode(text) == tokenizer.encode(text).ids
