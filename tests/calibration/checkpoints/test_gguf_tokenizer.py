"""GGUF tokenizers: text becomes the tokens that the model's own tokenizer.json gives."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.checkpoints.gguf import GgufFile
from calibration.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer
from calibration.data import default_text
from plugins.errors import InputError
from tests.calibration.checkpoints.gguf_files import write_metadata

AGAIN = "The file is truncated or damaged: download it again."
FOLDER = "Give the model's Hugging Face folder, whose tokenizer.json says how text is split."
WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"

# What tokens hide in: contractions, digits of several scripts, ends of lines, runs of spaces, marks
# that combine, scripts without spaces, symbols, control tokens.
TEXTS = (
    "\n\n1. It's we'LL don'T 1234567 3.14159 ½ ٣٤٥ ²³",
    "  two  spaces\t\ttabs\r\n\r\n   \n end   ",
    "HelloWorld HelloWorld iPhone McDonald USA's naïve e\u0301te\u0301 Ángel Ñandú ǅ",
    "漢字かなカナ 한국어 ไทย Здравствуй мир привет",
    "x+=1; y = {a: [b/c]}\n\n/* a // b */ ...!?--\n/\n  #",
    "<s> a <|end|> b</s>  🙂🙂 \u200d \ufeff a\u00a0b",
    "",
    " ",
)


def byte_level(regex: bool, prefix: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    last = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex,
    }
    return {"type": "Sequence", "pretokenizers": [*prefix, last]} if prefix else last


def split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


DIGITS = {"type": "Digits", "individual_digits": True}
# The pre_tokenizer and what else matters, as they stand in the tokenizer.json of SmolLM2, GPT-2,
# LLaMA 3, Qwen 2, Mistral Nemo and DeepSeek Coder.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smollm": (byte_level(True, (DIGITS,)), {}),
    "gpt-2": (byte_level(True, ()), {}),
    "llama-bpe": (
        byte_level(
            False,
            (
                split(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
            ),
        ),
        {"ignore_merges": True},
    ),
    "qwen2": (
        byte_level(
            False,
            (
                split(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
            ),
        ),
        {"normalizer": {"type": "NFC"}},
    ),
    "tekken": (
        byte_level(
            False,
            (
                split(
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
            ),
        ),
        {"ignore_merges": True},
    ),
    "deepseek-coder": (
        byte_level(
            False,
            (
                split("[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[一-龥ࠀ-一가-퟿]+"),
                DIGITS,
            ),
        ),
        {},
    ),
}


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    """Vocabulary and merges learned with no splitting at all, so that every cut shows; and a token
    that no merges make.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*TEXTS, *default_text().split("\n")[:300]]
    tokenizer.train_from_iterator(["\n".join(texts)], trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    model["vocab"]["ĠHelloWorld"] = len(model["vocab"])
    return model


def _own(vocabulary: dict[str, Any], pre: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json with this rule."""
    pre_tokenizer, more = OWN[pre]
    added = [
        {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for index, content in enumerate(("<|end|>", "<s>", "</s>"))
    ]
    merges_off = more.get("ignore_merges", False)
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": added,
                "normalizer": more.get("normalizer"),
                "pre_tokenizer": pre_tokenizer,
                "decoder": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "model": {**vocabulary, "ignore_merges": merges_off},
            }
        )
    )


def _metadata(vocabulary: dict[str, Any], pre: str, **more: Any) -> dict[str, Any]:
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    merges = [one if isinstance(one, str) else " ".join(one) for one in vocabulary["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


@pytest.fixture
def built(tmp_path: Path, vocabulary: dict[str, Any]) -> Callable[..., Any]:
    """make(pre, **{"ggml.key": value}) -> the tokenizer of a GGUF file."""

    def make(pre: str = "smollm", **more: Any) -> Any:
        path = write_metadata(tmp_path / "m.gguf", _metadata(vocabulary, pre, **more))
        return gguf_tokenizer(GgufFile(path))

    return make


@pytest.mark.parametrize("pre", OWN)
def test_text_becomes_the_tokens_of_the_models_own_rule(
    built: Callable[..., Any], vocabulary: dict[str, Any], pre: str
) -> None:
    tokenizer, own = built(pre), _own(vocabulary, pre)
    for text in (*TEXTS, default_text()[:20000]):
        ids = tokenizer(text)["input_ids"]
        assert ids == own.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == own.decode(ids, skip_special_tokens=False)


def test_every_rule_cuts_some_text_in_its_own_way(built: Callable[..., Any]) -> None:
    rules = {rule: name for name, rule in PRE_TOKENIZERS.items()}
    tokens = {
        name: tuple(tuple(built(name)(t)["input_ids"]) for t in TEXTS) for name in rules.values()
    }
    assert len(set(tokens.values())) == len(rules) == 8


def test_the_default_rule_cuts_as_llama_cpp_does(built: Callable[..., Any]) -> None:
    """Punctuation and runs of digits apart, and digits in threes from the left."""
    pieces = built("default").backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's  12345, x==1")
    assert [piece.replace("Ġ", " ") for piece, _ in pieces] == (
        ["It", "'", "s", " ", " ", "123", "45", ",", " x", "==", "1"]
    )  # fmt: skip


def test_the_demo_model_splits_digits(demo_gguf: Path) -> None:
    tokenizer = open_checkpoint(str(demo_gguf), True).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1.")["input_ids"]) == ["ĊĊ", "1", "."]
    assert len(tokenizer(default_text())["input_ids"]) == 26456
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] == OWN["smollm"][0]


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not there")
def test_wikitext_keeps_its_tokens(demo_gguf: Path) -> None:
    tokenizer = open_checkpoint(str(demo_gguf), True).tokenizer()
    assert len(tokenizer(WIKITEXT.read_text(encoding="utf-8"))["input_ids"]) == 301948


@pytest.mark.parametrize(
    ("pre", "flags", "before", "after"),
    [
        ("smollm", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, [1], [2]),
        ("smollm", {"ggml.add_eos_token": False}, [], []),
        ("llama-bpe", {"ggml.add_bos_token": True}, [1], []),
    ],
)
def test_tokens_added_around_text(
    built: Callable[..., Any],
    tmp_path: Path,
    pre: str,
    flags: dict[str, bool],
    before: list[int],
    after: list[int],
) -> None:
    tokenizer = built(pre, **flags)
    plain = tokenizer("light", add_special_tokens=False)["input_ids"]
    assert tokenizer("light")["input_ids"] == [*before, *plain, *after]
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("light")["input_ids"] == [*before, *plain, *after]


def test_rules_that_begin_text_with_bos_unless_the_file_says_no(
    tmp_path: Path, vocabulary: dict[str, Any]
) -> None:
    for pre, first in (("llama-bpe", 1), ("tekken", 1), ("smollm", None)):
        values = _metadata(vocabulary, pre)
        del values["tokenizer.ggml.add_bos_token"]
        tokenizer = gguf_tokenizer(GgufFile(write_metadata(tmp_path / "m.gguf", values)))
        ids = tokenizer("light")["input_ids"]
        assert (ids[0] == 1) == (first == 1)


def test_user_defined_tokens_stay_whole_and_are_not_special(
    built: Callable[..., Any], vocabulary: dict[str, Any]
) -> None:
    """A token of letters that byte-level BPE does not write, as llama.cpp's converter leaves it."""
    vocab = {**vocabulary["vocab"], "<｜think▁on｜>": len(vocabulary["vocab"])}
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3] * 3 + [1] * (len(tokens) - 4) + [4]
    tokenizer = built(**{"ggml.tokens": tokens, "ggml.token_type": kinds})
    ids = tokenizer("a<｜think▁on｜>b<s>")["input_ids"]
    assert ids[1] == len(tokens) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<｜think▁on｜>b"


def test_chat_templates(built: Callable[..., Any]) -> None:
    assert built().chat_template is None
    assert built(chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    both = built(**{"chat_template": "{{ 1 }}", "chat_template.tool_use": "{{ 2 }}"})
    assert both.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


def _refusal(built: Callable[..., Any], path: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        built(**more)
    message = str(caught.value)
    assert message.startswith(f"{path}")
    return message.removeprefix(f"{path}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"pre": "invented"},
            f", metadata tokenizer.ggml.pre: got 'invented', expected one of {', '.join(PRE_TOKENIZERS)}. {FOLDER}",
        ),
        (
            {"ggml.model": "t5"},
            ", metadata tokenizer.ggml.model: got 't5', expected gpt2 (byte-level BPE) or llama "
            f"(sentencepiece). {FOLDER}",
        ),
        (
            {"ggml.normalizer.lowercase": True},
            ", metadata tokenizer.ggml.normalizer.lowercase: got 'True', expected nothing: no "
            f"tokenizer here follows it. {FOLDER}",
        ),
        (
            {"ggml.add_bos_token": 1},
            f", metadata tokenizer.ggml.add_bos_token: got '1', expected true or false. {AGAIN}",
        ),
        (
            {"ggml.add_bos_token": True, "ggml.bos_token_id": 0xFFFFFFFF},
            ", metadata tokenizer.ggml.bos_token_id: got '4294967295', expected the token that "
            f"add_bos_token adds. {AGAIN}",
        ),
        (
            {"ggml.tokens": ["a", "b", "a"]},
            f", metadata tokenizer.ggml.tokens: got 'a' as tokens 0 and 2, expected it once. {FOLDER}",
        ),
        (
            {"ggml.tokens": [1, 2]},
            f", metadata tokenizer.ggml.tokens: got a list of 2, expected a list of strings. {AGAIN}",
        ),
        (
            {"ggml.token_type": [1, 2]},
            ", metadata tokenizer.ggml.token_type: got a list of 2, expected 901 numbers, one for "
            f"each token. {AGAIN}",
        ),
        (
            {"chat_template": "{{ x }}", "chat_template.a/b": "{{ y }}"},
            ", metadata tokenizer.chat_template: got 'a/b', expected the name of a template, such as "
            f"tool_use. {FOLDER}",
        ),
        (
            {"ggml.token_type": [1.0] * 900 + [math.nan]},
            f", metadata tokenizer.ggml.token_type: got nan, expected finite numbers. {AGAIN}",
        ),
        (
            {"ggml.add_bos_token": [True]},
            f", metadata tokenizer.ggml.add_bos_token: got a list of 1, expected one value. {AGAIN}",
        ),
        (
            {"ggml.merges": ["a b", "漢 字"]},
            ", metadata tokenizer.ggml.merges: got a list of 2, expected merges of the file's "
            f"tokens (Token `漢` out of vocabulary). {AGAIN}",
        ),
        (
            {"chat_template": 3},
            f", metadata tokenizer.chat_template: got '3', expected a template. {AGAIN}",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_tokenizers_that_cannot_be_followed(
    built: Callable[..., Any], tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    assert _refusal(built, tmp_path / "m.gguf", **more) == message


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges"])
def test_a_tokenizer_that_is_not_all_there(
    tmp_path: Path, vocabulary: dict[str, Any], key: str
) -> None:
    values = _metadata(vocabulary, "smollm")
    del values[f"tokenizer.ggml.{key}"]
    path = write_metadata(tmp_path / "m.gguf", values)
    with pytest.raises(InputError) as caught:
        gguf_tokenizer(GgufFile(path))
    assert str(caught.value) == (
        f"{path}: got no metadata tokenizer.ggml.{key}, expected it in a model file. "
        "Convert the model to GGUF again."
    )


# ---------------------------------------------------------------- sentencepiece


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    """Sentencepiece's tokens, best last: control tokens, bytes, letters, and what merges make, runs
    of spaces among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, max_token_length=9)
    lines = default_text().split("\n")[:200]
    tokenizer.train_from_iterator([line.replace(". ", ".     ") for line in lines], trainer)
    found = tokenizer.get_vocab()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    runs = ["▁" * length for length in range(2, 9)]
    learned = [token for token in sorted(found, key=found.get) if token not in runs]
    return ["<unk>", "<s>", "</s>", *bytes_, *runs, *learned]


def _greedy(text: str, scores: dict[str, float]) -> Iterator[str]:
    """Sentencepiece's BPE: of all neighbours that make a token the best is merged, the leftmost of
    equals; letters without a token become bytes.
    """
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        best = max(
            (
                (scores[symbols[at] + symbols[at + 1]], -at)
                for at in range(len(symbols) - 1)
                if symbols[at] + symbols[at + 1] in scores
            ),
            default=None,
        )
        if best is None:
            break
        at = -best[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    for symbol in symbols:
        if symbol in scores:
            yield symbol
        else:
            yield from (f"<0x{byte:02X}>" for byte in symbol.encode())


def _sentencepiece(path: Path, pieces: list[str], **more: Any) -> Any:
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
    return gguf_tokenizer(GgufFile(write_metadata(path, values)))


def test_sentencepiece_text_becomes_the_tokens_of_its_algorithm(
    tmp_path: Path, pieces: list[str]
) -> None:
    tokenizer = _sentencepiece(tmp_path / "m.gguf", pieces)
    scores = {token: -float(index) for index, token in enumerate(pieces)}
    generator = random.Random(0)
    lines = [line[:80] for line in default_text().split("\n") if line]
    texts = [
        "  lead", "a   b", "1 234", "żółw 漢 🙂\n\n", *lines[:40],
        *("".join(generator.choices("thea  \n.ż漢", k=20)) for _ in range(100)),
    ]  # fmt: skip
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *_greedy(text, scores)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_names_its_special_tokens_and_spaces_the_text_after_them(
    tmp_path: Path, pieces: list[str]
) -> None:
    tokenizer = _sentencepiece(tmp_path / "m.gguf", pieces)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a</s>a")["input_ids"])
    assert tokens == ["<s>", "▁a", "</s>", "▁a"]
    plain = _sentencepiece(tmp_path / "m.gguf", pieces, add_space_prefix=False, add_bos_token=False)
    assert plain.convert_ids_to_tokens(plain("a</s>a")["input_ids"]) == ["a", "</s>", "a"]
    assert plain.decode(plain(" a")["input_ids"]) == " a"


def test_sentencepiece_without_scores(tmp_path: Path, pieces: list[str]) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(InputError) as caught:
        _sentencepiece(path, pieces, scores=[1.0])
    assert str(caught.value) == (
        f"{path}, metadata tokenizer.ggml.scores: got a list of 1, expected {len(pieces)} numbers, "
        f"one for each token. {AGAIN}"
    )
