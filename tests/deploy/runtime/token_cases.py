"""Tokenizers of each style trained on the spot, texts to try them on, and the C++ tokenizer as a
process that answers questions.
"""

from __future__ import annotations

import json
import random
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY


class AnswerError(Exception):
    """An anybit::Error, its three parts as the arguments."""


class Answers:
    """tokens.cpp at work."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise AnswerError(*answer["error"])
        return answer["ok"]

    def encode(self, text: str | bytes, special: bool = True) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return list(self.ask(encode=raw.hex(), special=special))

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()


def source_code() -> str:
    return (REPOSITORY / "exporter" / "stages.py").read_text(encoding="utf-8")


def torture(pieces: int = 400) -> list[str]:
    """Texts of every category of characters, and what tokenizers get wrong."""
    choose = random.Random(0)
    kinds: dict[str, list[str]] = {}
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    mixed = [
        "".join(
            choose.choice(kinds[choose.choice(list(kinds))])
            if choose.random() < 0.5
            else choose.choice(" aZ9'.\n\r\t s")
            for _ in range(choose.randrange(1, 12))
        )
        for _ in range(pieces)
    ]
    return [
        "",
        *("".join(choose.sample(kind, min(len(kind), 150))) for kind in kinds.values()),
        "e\u0301\u0323\u0327 q\u0307\u0323 A\u030a \u212b \ufb01 \u017f \u1e9b\u0323 \u0344",
        "\u1100\u1161\u11a8 \uac00\u11a8 \uac01\u11a8 \u1100\u1161 \ua960",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f466\U0001f3fd \u2764\ufe0f \U0001f1e9\U0001f1ea",
        "a\r\nb\r\n\r\nc\n\n\n  d\t\te\r\r f \n g",
        "\u00a0x\u00a0\u2003y\u3000z\u0085\u2028w",
        " " * 50 + "x" + " " * 51 + "\n" + " " * 7,
        "it's IT'S I'LL '\u017f '\u212a don't'T they'Ve",
        "\ud7ff\ue000\ufffd\uffff\U0010ffff",
        "12345 1\u0663\u0664 \u2167\u00bd 3.14 1234567890",
        "\u2581\u2581a \u2581 b_\u2581",
        "a<|end|> b<|end|><|end|> <s>x </s> <unk>",
        "x" * 2000 + " " + "ab" * 700,
        *mixed,
    ]


_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_RULE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
QWEN_RULE = LLAMA3_RULE.replace("{1,3}", "")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CASED_RULE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


def byte_level(
    steps: Sequence[Any] = (), normalizer: Any = None, prefix: bool = False, **model: Any
) -> Any:
    """A byte-level BPE; without steps GPT-2's rule cuts the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(**model))
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not steps)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|end|>", "<|bos|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([source_code()], trainer)
    return made


def sentencepiece(pre_tokenizer: Any = None, prefix: bool = True, decoder: Any = None) -> Any:
    """A BPE of characters that falls back on bytes, as sentencepiece makes."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # in training alone
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=words, show_progress=False, limit_alphabet=60
    )
    made.train_from_iterator([source_code()], trainer)
    file = json.loads(made.to_str())
    file["added_tokens"] = file["added_tokens"][:3]
    file["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(file))
    if pre_tokenizer:
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizer
    elif prefix:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoder or decoders.Sequence([*steps, *strip])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def _smollm2() -> Any:
    from tokenizers import pre_tokenizers

    return byte_level([pre_tokenizers.Digits(individual_digits=True)])


def _split(rule: str, **more: Any) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return byte_level([pre_tokenizers.Split(Regex(rule), "isolated")], **more)


def _llama3() -> Any:
    from tokenizers import processors

    made = _split(LLAMA3_RULE, ignore_merges=True)
    bos = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(), bos])
    return made


def _qwen() -> Any:
    """With added tokens of every kind."""
    from tokenizers import AddedToken, normalizers

    made = _split(QWEN_RULE, normalizer=normalizers.NFC())
    made.add_tokens(
        [
            AddedToken("<tool>", special=False, normalized=False),
            AddedToken("word", single_word=True),
            AddedToken("left", lstrip=True, special=True),
            AddedToken("right", rstrip=True, normalized=True),
            AddedToken("\u212b x", normalized=True),
        ]
    )
    return made


def _form(name: str) -> Any:
    from tokenizers import normalizers

    return byte_level(prefix=True, normalizer=getattr(normalizers, name)())


def _mistral() -> Any:
    from tokenizers import pre_tokenizers

    return sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def _metaspace() -> Any:
    from tokenizers import decoders, pre_tokenizers

    return sentencepiece(pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())


STYLES: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "smollm2": _smollm2,
    "llama3": _llama3,
    "qwen": _qwen,
    "cased": lambda: _split(CASED_RULE),
    "nfd": lambda: _form("NFD"),
    "nfkc": lambda: _form("NFKC"),
    "nfkd": lambda: _form("NFKD"),
    "llama2": sentencepiece,
    "gemma": lambda: sentencepiece(prefix=False),
    "mistral": _mistral,
    "metaspace": _metaspace,
}
