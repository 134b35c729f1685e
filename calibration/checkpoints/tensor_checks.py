"""Checks a checkpoint's tensors against what its config asks for, and says the likely cause instead
of a wall of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np

from calibration.families import Decoder
from plugins.errors import InputError
from plugins.text import shown, some

__all__ = ["Names", "check_finite", "match_tensors", "same_numbers"]

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_BLOCK = 1 << 22  # elements looked at together, to bound the memory
_TRIED = 3  # prefixes, each with every name
# Buffers that old versions of transformers saved with a model: rotary frequencies and their waves,
# positions, and the number that masks stood for.
_INERT = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$"
)
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_QUANTISED = (".qweight", ".qzeros", ".weight_packed", ".SCB", ".W_q")


@dataclass(frozen=True)
class Names:
    """Under which names a checkpoint's files hold the decoder's tensors.

    Attributes:
        stored: {the decoder's name: the files'}, also of the head of a tied model where there is
            one.
        renaming: {pattern of the files' names: what stands for it in the decoder's}, for
            transformers' key_mapping; empty where they are the same.
        inert: the same of buffers that a decoder computes itself, and of spare tensors.
        packed: the decoder's names of tensors that the files hold as transformers' modules do.
    """

    stored: Mapping[str, str]
    renaming: Mapping[str, str]
    inert: Mapping[str, str]
    packed: Collection[str] = ()


def match_tensors(
    where: str,
    decoder: Decoder,
    found: Mapping[str, tuple[int, ...]],
    spare: Collection[str] = (),
) -> Names:
    """Account for every tensor of a checkpoint, by name and shape.

    All names may have a prefix that a wrapper around the model left there, if what is behind it
    fits exactly. As transformers does, a tied model may have its table under the head's name only.

    Args:
        found: {name: shape} in the files.
        spare: names of these that have no part in the result where the decoder has none such.

    Raises:
        InputError: tensors are missing, have another shape, or are neither the decoder's nor known
            to have no part in its result.
    """
    table = f"{decoder.embedding.name}.weight"
    prefixes = () if table in found else _prefixes(table, found)
    for prefix, replacement in prefixes:
        renamed = {
            replacement + name.removeprefix(prefix) if name.startswith(prefix) else name: name
            for name in found
        }
        if len(renamed) == len(found):
            with suppress(InputError):
                shapes = {new: found[old] for new, old in renamed.items()}
                left = {new for new, old in renamed.items() if old in spare}
                names = _matched(where, decoder, shapes, left)
                return Names(
                    {ours: renamed[theirs] for ours, theirs in names.stored.items()},
                    {f"^{re.escape(prefix)}": replacement},
                    {ours: renamed[theirs] for ours, theirs in names.inert.items()},
                    names.packed,
                )
    return _matched(where, decoder, found, spare)


def _prefixes(table: str, found: Iterable[str]) -> list[tuple[str, str]]:
    """What may stand before a name, and what is there in its place: before all of it
    (base_model.model.model.layers), or behind its first part (model.language_model.layers).
    """
    first, _, rest = table.partition(".")
    prefixes = (
        (name.removesuffix(end), replacement)
        for end, replacement in ((table, ""), (rest, f"{first}."))
        for name in found
        if name.endswith(f".{end}")
    )
    return list(islice(prefixes, _TRIED))


def _matched(
    where: str, decoder: Decoder, found: Mapping[str, tuple[int, ...]], spare: Collection[str]
) -> Names:
    wanted, packed = _as_found(decoder, found)
    table, head = f"{decoder.embedding.name}.weight", f"{decoder.head.name}.weight"
    if decoder.tied and head in found:
        wanted |= {head: wanted[table]}
    stored = {name: name for name in wanted if name in found}
    if decoder.tied and head in stored and table not in stored:
        stored[table] = stored.pop(head)
        del wanted[head]
    missing = [name for name in wanted if name not in stored]
    if missing:
        cause, fix = _missing_cause(missing, decoder, found)
        raise InputError(
            where,
            f"got {len(wanted) - len(missing)} of the {len(wanted)} tensors its config asks for, "
            f"missing {some(_summarized(missing, decoder))}{cause}",
            fix,
        )
    for name, shape in wanted.items():
        if found[stored[name]] != shape:
            raise InputError(
                f"{where}, tensor {shown(stored[name])}",
                f"got shape {list(found[stored[name]])}, expected {list(shape)} from the config",
                "The weights and the config belong to different models: use the config of these weights",
            )
    others = sorted(found.keys() - stored.values())
    inert = {name: name for name in others if name in spare or _INERT.search(name)}
    extra = [name for name in others if name not in inert]
    if extra:
        raise InputError(
            where,
            f"got tensors the config does not ask for: {some(extra)}",
            f"The export would drop them: correct {_counts(extra)} in the config, or save the "
            "model without them",
        )
    stored |= {ours: stored[theirs] for ours, theirs in packed.items()}
    return Names(stored, {}, inert, frozenset(packed))


def _as_found(
    decoder: Decoder, found: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """{name: shape} that files of this form hold, and {the decoder's name: the packed tensor's} of
    what they hold as transformers' modules do.
    """
    wanted, shapes = decoder.stored_shapes(), decoder.module_shapes()
    packed = {
        info.stored: info.module
        for info in decoder.tensors()
        if info.packed and info.module in found and info.stored not in found
    }
    for ours, theirs in packed.items():
        del wanted[ours]
        wanted[theirs] = shapes[theirs]
    return wanted, packed


def _counts(extra: Iterable[str]) -> str:
    """Fields of a config of which a wrong one leaves these tensors over."""
    if any(map(_EXPERT.search, extra)):
        return "num_hidden_layers or num_experts"
    return "num_hidden_layers, attention_bias or mlp_bias"


def _summarized(missing: Iterable[str], decoder: Decoder) -> list[str]:
    """Names, those of experts by layer: "experts 3, 7 of layer 12"."""
    words, experts = list[str](), dict[int, dict[int, None]]()
    layers = {info.name: block.index for block in decoder.blocks for info in block.tensors()}
    for name in missing:
        info = decoder.infos.get(name)
        if info is None or info.expert is None:
            words.append(name)
        else:
            experts.setdefault(layers[name], {})[info.expert] = None
    for layer, indices in experts.items():
        expert = "expert" if len(indices) == 1 else "experts"
        words.append(f"{expert} {some([str(index) for index in indices])} of layer {layer}")
    return words


def _missing_cause(
    missing: Sequence[str], decoder: Decoder, found: Mapping[str, tuple[int, ...]]
) -> tuple[str, str]:
    table = f"{decoder.embedding.name}.weight"
    first, _, rest = table.partition(".")
    if missing == [f"{decoder.head.name}.weight"]:
        return (
            "",
            "If the head is the embedding, set tie_word_embeddings to true in the config; else "
            "complete the weights",
        )
    if any(".lora_" in name for name in found):
        return (
            " (these are an adapter's tensors)",
            "Merge the adapter into its base model with peft's merge_and_unload, and give what "
            "that saves",
        )
    if rest in found or any(name.startswith("layers.") for name in found):
        return (
            f" (names lack the prefix {first}.)",
            "Save the model with its head (LlamaForCausalLM, not LlamaModel)",
        )
    if any(name.endswith(_QUANTISED) for name in found):
        return " (the weights are quantised)", "Give the float model it was made from"
    if table not in found and (prefixes := _prefixes(table, found)):
        return (
            f" (names have the prefix {shown(prefixes[0][0])})",
            "Without that prefix they are not the config's model either: save the language model "
            "alone, with its own config",
        )
    indices = [
        int(match.group(1))
        for name in found
        if (match := re.search(r"\.layers\.(\d{1,9})\.", name))
    ]
    have = max(indices, default=-1) + 1
    if have < decoder.layers:
        return (
            f" (layers in the file: {have}, in the config: {decoder.layers})",
            "The file is incomplete or belongs to a smaller model: check the download",
        )
    experts = [int(match.group(1)) for name in found if (match := _EXPERT.search(name))]
    if experts and decoder.routers and max(experts) + 1 < decoder.config.experts:
        return (
            f" (experts in the file: {max(experts) + 1}, in the config: {decoder.config.experts})",
            "The file is incomplete or belongs to a smaller model: check the download",
        )
    return "", "The download is incomplete or the file belongs to another model"


def same_numbers(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two tensors of one shape are equal in fp32; one in memory twice is not read."""
    if first.__array_interface__ == second.__array_interface__:
        return True
    one, other = first.reshape(-1), second.reshape(-1)
    return all(
        np.array_equal(
            np.asarray(one[start : start + _BLOCK], np.float32),
            np.asarray(other[start : start + _BLOCK], np.float32),
        )
        for start in range(0, one.size, _BLOCK)
    )


def check_finite(where: str, array: np.ndarray) -> None:
    """Refuse NaN, Inf and types that are not float.

    Raises:
        InputError: with the count and the first position.
    """
    if array.dtype.name not in _FLOATS:
        raise InputError(
            where,
            f"got dtype {array.dtype.name}, expected one of {', '.join(_FLOATS)}",
            "Give the float model",
        )
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = np.asarray(flat[start : start + _BLOCK], np.float32)
        if not np.isfinite(block.sum(dtype=np.float64)):
            bad = np.flatnonzero(~np.isfinite(block))
            position = [int(i) for i in np.unravel_index(start + int(bad[0]), array.shape)]
            raise InputError(
                where,
                f"got {block[bad[0]]} at {position}, expected finite numbers",
                "The weights are damaged: download or train them again",
            )
