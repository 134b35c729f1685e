"""Makes a transformers tokenizer of a GGUF file's metadata, splitting text as the model's own does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibration.checkpoints.gguf import GgufFile
from calibration.checkpoints.gguf_config import token_id
from calibration.checkpoints.tokenizer import check_templates
from plugins.errors import InputError
from plugins.text import one_line

__all__ = ["PRE_TOKENIZERS", "gguf_tokenizer"]

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_MERGES, _SCORES = "tokenizer.ggml.merges", "tokenizer.ggml.scores"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of token_type
_SPACE = "▁"
_GIVE_FOLDER = "Give the model's Hugging Face folder, whose tokenizer.json says how text is split"

# Other keys than these would change what text becomes, unless they are 0, false or empty.
_KNOWN = frozenset(
    {
        *(_MODEL, _PRE, _TOKENS, _TYPES, _MERGES, _SCORES),
        *(
            f"tokenizer.ggml.{name}_token_id"
            for name in (
                *("bos", "eos", "eot", "eom", "unknown", "padding"),
                *("seperator", "cls", "mask", "prefix", "suffix", "middle"),
                *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
            )
        ),
        *(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token")),
        *(f"tokenizer.ggml.{name}" for name in ("add_space_prefix", "token_type_count")),
    }
)


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE cuts text before it merges.

    Attributes:
        splits: regular expressions; each cuts the pieces of the one before at its matches.
        digits: every digit is a piece, before all else.
        gpt2: GPT-2's rule comes last.
        nfc: text is normalized to NFC first.
        whole_words: a piece that is a token is that token, whatever merges make of it.
        bos: text begins with the token for it, if the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


# The parts of the rules that follow GPT-4's tokenizer.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
)
_GPT2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _rule(words: str, digits: str, line_ends: str) -> str:
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{line_ends}|{_SPACES}"


_LLAMA3_RULE = _rule(f"{_CONTRACTION}|{_LETTERS}", r"\p{N}{1,3}", r"[\r\n]*")
_GPT2 = PreTokenizer(gpt2=True)
_DIGITS_GPT2 = PreTokenizer(digits=True, gpt2=True)
_LLAMA3 = PreTokenizer((_LLAMA3_RULE,), whole_words=True, bos=True)

# By tokenizer.ggml.pre. The rules are those of the tokenizer.json of SmolLM2, Refact, GPT-2, LLaMA 3,
# Qwen2, Mistral Nemo and DeepSeek Coder; other names stand here that mean one of these to llama.cpp
# (src/llama-vocab.cpp). Where llama.cpp differs from the model, as in Qwen's NFC, the model is right.
PRE_TOKENIZERS = {
    # What llama.cpp falls back on; no model's own rule is known for such a file.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_RULE, r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    "falcon3": _LLAMA3,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "phi-2": _GPT2,
    "qwen2": PreTokenizer((_rule(f"{_CONTRACTION}|{_LETTERS}", r"\p{N}", r"[\r\n]*"),), nfc=True),
    "refact": _DIGITS_GPT2,
    "smaug-bpe": PreTokenizer((_LLAMA3_RULE,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "tekken": PreTokenizer((_rule(_CASED, r"\p{N}", r"[\r\n/]*"),), whole_words=True, bos=True),
}


def gguf_tokenizer(file: GgufFile) -> Any:
    """The transformers tokenizer that the metadata describes.

    Raises:
        InputError: there is none, it is of a kind or cuts text by a rule that is not known here, or
            its lists do not fit each other.
    """
    from transformers import PreTrainedTokenizerFast

    _check_keys(file)
    tokens = _tokens(file)
    model = str(file.required(_MODEL))
    if model not in ("gpt2", "llama"):
        raise file.wrong(_MODEL, "gpt2 (byte-level BPE) or llama (sentencepiece)", _GIVE_FOLDER)
    build = _byte_level if model == "gpt2" else _sentencepiece
    backend, bos = build(file, tokens)
    ids = {
        "bos": token_id(file, "bos", len(tokens)),
        "eos": token_id(file, "eos", len(tokens)),
        "unk": token_id(file, "unknown", len(tokens)),
        "pad": token_id(file, "padding", len(tokens)),
    }
    options: dict[str, Any] = {
        f"{name}_token": tokens[index] for name, index in ids.items() if index is not None
    }
    for name, default in (("bos", bos), ("eos", False)):
        if _flag(file, f"tokenizer.ggml.add_{name}_token", default):
            if ids[name] is None:
                raise file.wrong(
                    f"tokenizer.ggml.{name}_token_id", f"the token that add_{name}_token adds"
                )
            options[f"add_{name}_token"] = True
    if template := _chat_template(file):
        options["chat_template"] = template
    _add_special_tokens(file, backend, tokens)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def _check_keys(file: GgufFile) -> None:
    for key in file.keys:
        unknown = key.startswith("tokenizer.ggml.") and key not in _KNOWN
        if unknown and file.says(key):
            raise file.wrong(key, "nothing: no tokenizer here follows it", _GIVE_FOLDER)


def _flag(file: GgufFile, key: str, default: bool) -> bool:
    value = file.value(key, default)
    if not isinstance(value, bool):
        raise file.wrong(key, "true or false")
    return value


def _strings(file: GgufFile, key: str) -> list[str]:
    if key not in file.keys:
        raise file.missing(key)
    found = file.strings(key)
    if found is None:
        raise file.wrong(key, "a list of strings")
    return found


def _tokens(file: GgufFile) -> list[str]:
    tokens = _strings(file, _TOKENS)
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if first.setdefault(token, index) != index:
            raise InputError(
                f"{file.path}, metadata {_TOKENS}",
                f"got {token[:40]!r} as tokens {first[token]} and {index}, expected it once",
                _GIVE_FOLDER,
            )
    return tokens


def _numbers(file: GgufFile, key: str, count: int) -> list[Any]:
    found = file.numbers(key) if file.length(key) == count else None
    if found is None:
        raise file.wrong(key, f"{count} numbers, one for each token")
    return found


def _bpe(file: GgufFile, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # tokenizers raises its own kind
        reason = one_line(error, 80).removeprefix("Error while initializing BPE: ")
        raise file.wrong(_MERGES, f"merges of the file's tokens ({reason})") from None


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """The backend of a byte-level BPE, and whether text begins with bos by default."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    rule = PRE_TOKENIZERS.get(str(file.required(_PRE)))
    if rule is None:
        raise file.wrong(_PRE, f"one of {', '.join(PRE_TOKENIZERS)}", _GIVE_FOLDER)
    pairs = [merge.partition(" ") for merge in _strings(file, _MERGES)]
    merges = [(left, right) for left, _, right in pairs]
    backend = _bpe(file, tokens, merges, ignore_merges=rule.whole_words)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [
        *([pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []),
        *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2),
    ]
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, rule.bos


def _sentencepiece(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """The backend of a sentencepiece BPE, and that text begins with bos by default.

    As in llama.cpp, and in LLaMA 2's tokenizer.json, a space comes before the text and again after
    every special token in it.
    """
    from tokenizers import decoders, normalizers

    unknown = token_id(file, "unknown", len(tokens))
    merges = _merges_by_score(tokens, _numbers(file, _SCORES, len(tokens)))
    backend = _bpe(
        file,
        tokens,
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = _flag(file, "tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend(_SPACE)] if prefix else []),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if prefix else []),
        ]
    )
    return backend, True


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together of two, best token first, as sentencepiece merges."""
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (-scores[ids[token]], ids[token[:cut]], ids[token[cut:]])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]


def _add_special_tokens(file: GgufFile, backend: Any, tokens: list[str]) -> None:
    """Mark the tokens that text may hold as a whole: control tokens, and those that the model's
    maker added.
    """
    from tokenizers import AddedToken

    if _TYPES not in file.keys:
        return
    kinds = _numbers(file, _TYPES, len(tokens))
    for special, wanted in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in wanted and token
            ]
        )


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """The template, or all of them by name where there is more than one."""
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": file.value(key)
        for key in file.keys
        if key == prefix or key.startswith(prefix + ".")
    }
    for name, template in found.items():
        if not isinstance(template, str):
            raise file.wrong(prefix if name == "default" else f"{prefix}.{name}", "a template")
    check_templates(found, f"{file.path}, metadata {prefix}", _GIVE_FOLDER)
    return found if len(found) > 1 else found.get("default")
