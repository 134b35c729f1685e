"""model.json: what a program has to know to run OUT/onnx or OUT/engine, so that either folder can be
shipped alone.

It names the model, its sizes, its end tokens, how its KV cache looks, and every file beside it with
size and checksum. docs/onnx.md lists the fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from calibration.out.files import write_json
from calibration.out.json_file import Size, TokenId, checked, read_json
from calibration.out.layout import DESCRIPTION
from calibration.out.records import Bits, Dtype, FileName, FileRecords
from plugins.errors import InputError

__all__ = [
    "FORMAT",
    "LEAST_PENALTY",
    "MOST_PENALTY",
    "MOST_TEMPERATURE",
    "Description",
    "KeyValueCache",
    "SamplingDefaults",
    "read_description",
    "write_description",
]

FORMAT = 1

# Nobody means more; logits times a penalty without bounds would be no numbers.
MOST_TEMPERATURE = 100.0
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0


@dataclass(frozen=True, kw_only=True)
class KeyValueCache:
    """The KV cache: for each layer a key and a value tensor [batch, heads, tokens, head_dim]; of few
    bits int8 [batch, heads, tokens, bits head_dim / 8], and fp32 [batch, heads, tokens, 2] for the
    scales and zero points of each.

    Attributes:
        layers, heads, head_dim: its sizes.
        bits: of each number; 16: as `dtype` says.
        dtype: of the model, "float16", "bfloat16" or "float32".
        token_bytes: what one token of one sequence takes in all layers.
        form: "concat", where it grows by what comes in, or "static", where it has room for
            `capacity` tokens, into which new ones are written.
        capacity: of a static cache, in tokens; None of one that grows.
        past, present: names of the model's inputs and outputs.
    """

    layers: Size
    heads: Size
    head_dim: Size
    bits: Bits
    dtype: Dtype
    token_bytes: Size
    form: Literal["concat", "static"] = "concat"
    capacity: Size | None = None
    past: str = "past_key_values.{layer}.{part}"
    present: str = "present.{layer}.{part}"
    parts: tuple[str, ...] = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How the model's makers want tokens to be chosen, where the user does not say.

    Attributes:
        do_sample: draw a token; else the best one is taken.
        temperature: of the draw.
        top_k: draw among the K best only; 0 is all.
        top_p: draw among the fewest tokens that are this likely together; 1 is all.
        repetition_penalty: divides the logits of what the text has already, multiplies negative
            ones; 1 leaves them.
    """

    do_sample: bool = False
    temperature: Annotated[float, Meta(ge=0, le=MOST_TEMPERATURE)] = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Meta(ge=LEAST_PENALTY, le=MOST_PENALTY)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Description:
    """What model.json holds.

    Attributes:
        model, family: names.
        scheme: label, such as w4a8.
        method: how it was quantized.
        dtype: of all that is not integer.
        sizes: hidden_size, intermediate_size, num_attention_heads, vocab_size.
        context: tokens the model was made for.
        max_context: most tokens that a sequence may have here; an engine's profiles may allow fewer.
        max_batch: most sequences in one call; None: no limit.
        max_tokens: most new tokens in one call; None: no limit.
        bos_token_id: None where the model has none.
        eos_token_ids: each of them ends a text.
        sampling: how tokens are chosen where the user does not say.
        cache: the KV cache.
        chat_template: of the tokenizer (Jinja), or None.
        tokenizer: names of its files.
    """

    model: str
    family: str
    scheme: str
    method: str
    dtype: Dtype
    sizes: dict[str, Size]
    context: Size
    max_context: Size
    max_batch: Size | None = None
    max_tokens: Size | None = None
    bos_token_id: TokenId | None
    eos_token_ids: tuple[TokenId, ...]
    sampling: SamplingDefaults = SamplingDefaults()
    cache: KeyValueCache
    chat_template: str | None
    tokenizer: tuple[FileName, ...] = field(default=())

    def static(self, capacity: int) -> Description:
        """The same model with a cache that has room for so many tokens from the beginning."""
        cache = replace(self.cache, form="static", capacity=capacity)
        return replace(self, max_context=capacity, cache=cache)

    def within(self, max_batch: int, max_tokens: int, max_context: int) -> Description:
        """The same model in an engine of these limits."""
        return replace(
            self,
            max_batch=max_batch,
            max_tokens=max_tokens,
            max_context=min(self.max_context, max_context),
        )


class _ModelFile(TypedDict):
    """What else model.json holds."""

    files: FileRecords


def write_description(
    folder: Path, description: Description, records: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write model.json into `folder`.

    Args:
        records: of every other file there, from calibration.out.files.file_records.
    """
    value = {"format": FORMAT, **asdict(description), "files": dict(records)}
    write_json(folder / DESCRIPTION, value)


def read_description(path: Path, renew: str) -> tuple[Description, FileRecords]:
    """A description, and the records of the files beside it.

    Args:
        path: model.json.
        renew: what to do about one that is missing or of another format.

    Raises:
        InputError: it is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise InputError(
            str(path), "got no such file, expected it in a folder made by this version", renew
        )
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise InputError(
            str(path), f"got format {json.dumps(value.get('format'))}, expected {FORMAT}", renew
        )
    found = checked(value, _ModelFile, str(path), renew)
    return checked(value, Description, str(path), renew), found["files"]
