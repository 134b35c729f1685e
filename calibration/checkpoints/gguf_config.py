"""Makes a Hugging Face config of a GGUF file's metadata, and refuses metadata that it cannot follow."""

from __future__ import annotations

import math
from typing import Any

from calibration.checkpoints.gguf import GgufFile
from calibration.families import Family, family, family_names
from calibration.families.decoder import Config
from plugins.errors import InputError

__all__ = ["gguf_config", "gguf_family", "token_id"]

_ANOTHER_MODEL = "Choose a model without it; this export would compute something else"
_EXPERTS = "expert_count"
_NONE = (-1, 0xFFFFFFFF)  # as a token's id: the model has none

# Below "llama." or another architecture's name. What llama.cpp makes of each key stands in its
# src/llama-model.cpp, src/llama-context.cpp and src/models/llama.cpp.
_READ = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "vocab_size",  # the embedding's rows say it
    }
)
_HARMLESS = frozenset(
    {
        "attention.layer_norm_epsilon",  # of LayerNorm, which these decoders have not
        "decoder_start_token_id",  # of encoders with decoders
        "pooling_type",  # of embedding models
        "rope.scaling.finetuned",  # a remark
        "tensor_data_layout",  # "Meta AI original pth": rows of queries and keys, always so here
    }
)
_NEUTRAL = {
    "embedding_scale": 1.0,
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
}
_ALWAYS = {  # what every decoder here does, so that no other value is followed
    "attention.causal": True,
    "expert_gating_func": 1,  # softmax
    "expert_weights_norm": True,
}


def gguf_family(file: GgufFile) -> Family:
    """The family that reads this file.

    Raises:
        InputError: none does.
    """
    kind = file.value("general.type", "model")
    if kind != "model":
        raise file.wrong("general.type", "'model'", "Give the model itself")
    architecture = str(file.required("general.architecture"))
    readers = [family(name) for name in family_names() if family(name).gguf]
    if architecture not in {one.gguf for one in readers}:
        raise InputError(
            str(file.path),
            f"got architecture {architecture[:60]}, expected one of {_architectures(readers)}",
            "Choose a model of a supported architecture",
        )
    count = f"{architecture}.{_EXPERTS}"
    experts = file.says(count)
    fitting = [one for one in readers if (_EXPERTS in one.gguf_required) == experts]
    found = next((one for one in fitting if one.gguf == architecture), None)
    if found is not None:
        return found
    if not experts:
        raise file.missing(count)
    raise InputError(
        str(file.path),
        f"got a mixture of experts ({architecture}), expected one of {_architectures(fitting)} where "
        "there are experts",
        "Give the model as a Hugging Face folder",
    )


def _architectures(families: list[Family]) -> str:
    return ", ".join(sorted({one.gguf for one in families}))


def gguf_config(file: GgufFile, found: Family) -> dict[str, Any]:
    """The Hugging Face config that the metadata and the tensors describe.

    Raises:
        InputError: metadata is missing, damaged, or changes numbers in a way that no family follows.
    """
    key = f"{found.gguf}."
    heads, hidden = (
        file.integer(key + "attention.head_count"),
        file.integer(key + "embedding_length"),
    )
    head_dim = file.integer(key + "attention.key_length", max(hidden // heads, 1))
    context = file.integer(key + "context_length")
    layers = file.integer(key + "block_count")
    if layers > len(file.tensors):
        raise file.wrong(
            key + "block_count", f"at most the {len(file.tensors)} tensors of the file"
        )
    if head_dim % 2:
        raise file.wrong(
            key + "attention.key_length", f"even heads, not {head_dim}", _ANOTHER_MODEL
        )
    for name in ("attention.value_length", "rope.dimension_count"):
        if name not in found.gguf_fields and file.integer(key + name, head_dim) != head_dim:
            raise file.wrong(key + name, f"{head_dim}, a whole head", _ANOTHER_MODEL)
    _check_keys(file, found, head_dim, context)
    embedding = file.tensors.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding is not None else file.integer(key + "vocab_size")
    if file.length("tokenizer.ggml.tokens") not in (None, vocab):
        raise file.wrong("tokenizer.ggml.tokens", f"{vocab}, the rows of token_embd.weight")
    values = {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "hidden_size": hidden,
        "intermediate_size": file.integer(key + "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(key + "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": file.number(key + "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": token_id(file, "bos", vocab),
        "eos_token_id": _end_tokens(file, vocab),
        "pad_token_id": token_id(file, "padding", vocab),
        "rope_parameters": _rope(file, key, context),
    }
    own = {
        name: file.number(key + ours)
        for ours, name in found.gguf_fields.items()
        if ours in found.gguf_required or file.says(key + ours)
    }
    return {**values, **found.gguf_implied(Config({**values, **own})), **own}


def token_id(file: GgufFile, name: str, vocab: int) -> int | None:
    """The id of a special token, such as "bos", or None if the file names none.

    Sentencepiece's own ids stand for what such a file leaves out, as in llama.cpp; that drops an
    id beyond the tokens, too.

    Raises:
        InputError: it is no token's id.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    sentencepiece = file.value("tokenizer.ggml.model") == "llama"
    default = {"unknown": 0, "bos": 1, "eos": 2}.get(name) if sentencepiece else None
    value = file.value(key, default)
    if value is None or value in _NONE:
        return None
    if type(value) is not int or value < 0:
        raise file.wrong(key, "a token's id")
    if value < vocab:
        return value
    if name in ("bos", "eos", "eot", "eom"):  # text would not begin or end as the model learned
        raise file.wrong(key, f"an id below {vocab}, the number of tokens")
    return None


def _end_tokens(file: GgufFile, vocab: int) -> int | list[int] | None:
    """What ends generation: the end of text, of a turn and of a message."""
    found = [token_id(file, name, vocab) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(one for one in found if one is not None))
    return ends if len(ends) > 1 else ends[0] if ends else None


def _check_keys(file: GgufFile, found: Family, head_dim: int, context: int) -> None:
    """Refuse a key of the architecture that could change numbers and is not followed."""
    key = f"{found.gguf}."
    neutral = {**_NEUTRAL, "attention.scale": head_dim**-0.5}
    for full in file.keys:
        name = full.removeprefix(key)
        if name == full or name in _READ or name in _HARMLESS or name in found.gguf_fields:
            continue
        value = file.value(full) if file.length(full) is None else None
        if name in _ALWAYS:
            if value != _ALWAYS[name]:
                raise file.wrong(full, str(_ALWAYS[name]), _ANOTHER_MODEL)
        elif name == "attention.sliding_window" and isinstance(value, int) and value >= context:
            continue  # it sees the whole context
        elif name in neutral and isinstance(value, float):
            if value and not math.isclose(value, neutral[name], rel_tol=1e-6):
                raise file.wrong(full, f"{neutral[name]:g}", _ANOTHER_MODEL)
        elif file.says(full):
            raise file.wrong(
                full, f"nothing: no {found.gguf} decoder here follows it", _ANOTHER_MODEL
            )


def _rope(file: GgufFile, key: str, context: int) -> dict[str, Any]:
    """The parameters of RoPE as transformers has them.

    llama.cpp's converter writes what a Hugging Face config says, so a value means here what it
    means there. llama.cpp itself leaves yarn_attn_factor, yarn_beta_fast and yarn_beta_slow unread
    in this architecture; the model that was converted had them.
    """
    scaling = key + "rope.scaling."
    if (factors := file.long_factors()) is not None:
        return _longrope(file, key, context, factors)
    kind = str(file.value(scaling + "type", "linear"))  # so in llama.cpp, with a factor of 1
    if kind not in ("none", "linear", "yarn"):
        raise file.wrong(
            scaling + "type", "none, linear or yarn: frequencies that stay the same", _ANOTHER_MODEL
        )
    factor = _rope_factor(file, key)
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.number(key + "rope.freq_base", 10000.0),
    }
    extrapolation = file.value(scaling + "yarn_ext_factor", -1.0)  # negative: as the type has it
    if kind == "yarn":
        original = scaling + "original_context_length"
        if not (isinstance(extrapolation, float) and (extrapolation < 0 or extrapolation == 1)):
            raise file.wrong(scaling + "yarn_ext_factor", "1", _ANOTHER_MODEL)
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": file.integer(original, context)
            if file.says(original)
            else context,
            "attention_factor": _attention_factor(file, scaling, factor),
            "beta_fast": _or_absent(file, scaling + "yarn_beta_fast", 32.0),
            "beta_slow": _or_absent(file, scaling + "yarn_beta_slow", 1.0),
        }
    for name in ("attn_factor", "yarn_attn_factor"):
        if _or_absent(file, scaling + name, 1.0) != 1:
            raise file.wrong(scaling + name, f"1 with RoPE scaling of type {kind}", _ANOTHER_MODEL)
    if not (isinstance(extrapolation, float) and extrapolation <= 0):
        raise file.wrong(
            scaling + "yarn_ext_factor", f"0 with RoPE scaling of type {kind}", _ANOTHER_MODEL
        )
    return (
        rope if kind == "none" or factor == 1 else rope | {"rope_type": "linear", "factor": factor}
    )


def _longrope(
    file: GgufFile, key: str, context: int, factors: tuple[list[float], list[float]]
) -> dict[str, Any]:
    """RoPE whose frequencies are divided by tensors, one for short texts and one for long ones."""
    scaling, (short, long) = key + "rope.scaling.", factors
    original, attention = scaling + "original_context_length", scaling + "attn_factor"
    rope = {
        "rope_type": "longrope",
        "rope_theta": file.number(key + "rope.freq_base", 10000.0),
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": file.integer(original, context),
    }
    if file.says(attention):  # else it follows from how much longer the context was made
        rope["attention_factor"] = file.number(attention)
    return rope


def _rope_factor(file: GgufFile, key: str) -> float:
    """How much longer the context was made; the older key counts where the newer one is missing."""
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if file.value(key + name) is not None:
            return _or_absent(file, key + name, 1.0)
    return 1.0


def _or_absent(file: GgufFile, key: str, default: float) -> float:
    """A factor, where 0 is as good as none."""
    return file.number(key, default) if file.says(key) else default


def _attention_factor(file: GgufFile, scaling: str, factor: float) -> float:
    """The factor on cos and sin: YaRN's own unless the model has another, times attn_factor."""
    own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return _or_absent(file, scaling + "yarn_attn_factor", own) * _or_absent(
        file, scaling + "attn_factor", 1.0
    )
