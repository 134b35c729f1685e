"""Describes a quantized model for those who run it: calibration/out/description.py says what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.out.description import Description, KeyValueCache, SamplingDefaults
from calibration.out.json_file import MAKE_AGAIN, read_json
from calibration.out.layout import BITS_FILE
from calibration.quant.scheme import FLOAT_BITS
from plugins.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.quant.folder import QuantModel

__all__ = ["describe", "token_list"]

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def describe(quant: QuantModel) -> Description:
    """What quant.json and the tokenizer's files say; no weights are read."""
    config, context = quant.config, int(quant.config["max_position_embeddings"])
    files = sorted(
        name for name in quant.files if not name.endswith(".safetensors") and name != BITS_FILE
    )
    return Description(
        model=quant.source["name"],
        family=quant.family.name,
        scheme=quant.label,
        method=quant.scheme.method,
        dtype=quant.scheme.dtype,
        sizes={name: int(config[name]) for name in _SIZES},
        context=context,
        max_context=context,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(token_list(config.get("eos_token_id"))),
        sampling=SamplingDefaults(**config.get("sampling", {})),
        cache=_cache(quant),
        chat_template=_chat_template(quant.path),
        tokenizer=tuple(files),
    )


def _cache(quant: QuantModel) -> KeyValueCache:
    """As exporter/graph writes it."""
    config, bits, dtype = quant.config, quant.scheme.kv_bits, quant.scheme.dtype
    heads, width = int(config["num_key_value_heads"]), int(config["head_dim"])
    low = bits < FLOAT_BITS
    row = bits * width // 8 + 8 if low else width * (4 if dtype == "float32" else 2)
    parts = ("key", "value")
    return KeyValueCache(
        layers=quant.layers,
        heads=heads,
        head_dim=width,
        bits=bits,
        dtype=dtype,
        token_bytes=2 * quant.layers * heads * row,
        parts=(*parts, *(f"{part}_scale" for part in parts)) if low else parts,
    )


def token_list(tokens: Any) -> list[int]:
    """What a config means where it may give no token, one or several."""
    return [] if tokens is None else list(tokens) if isinstance(tokens, list | tuple) else [tokens]


def _chat_template(folder: Path) -> str | None:
    """The tokenizer's template: transformers writes a file of its own, older versions a field."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                str(file), f"got a template that is not UTF-8 ({error})", MAKE_AGAIN
            ) from None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
