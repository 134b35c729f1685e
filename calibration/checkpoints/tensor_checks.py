"""Checks a checkpoint's tensors against what its config asks for, and says the likely cause instead
of a wall of names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from plugins.errors import InputError

__all__ = ["check_finite", "check_tensors"]

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_BLOCK = 1 << 22  # elements looked at together, to bound the memory
_SHOWN = 3


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )


def check_tensors(
    where: str,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    layers: int,
) -> None:
    """Names and shapes against the config.

    Raises:
        InputError: tensors are missing, have another shape, or are biases and weights that the
            graph would drop.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        cause, fix = _missing_cause(missing, found, layers)
        raise InputError(
            where,
            f"got {len(wanted) - len(missing)} of the {len(wanted)} tensors its config asks for, "
            f"missing {_some(missing)}{cause}",
            fix,
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(
                f"{where}, tensor {name}",
                f"got shape {list(found[name])}, expected {list(shape)} from the config",
                "The weights and the config belong to different models: use the config of these weights",
            )
    extra = [
        name
        for name in found
        if name not in wanted and re.search(r"\.layers\.\d+\..*(_proj|norm)\.(weight|bias)$", name)
    ]
    if extra:
        raise InputError(
            where,
            f"got tensors the config does not ask for: {_some(extra)}",
            "The export would drop them: correct num_hidden_layers, attention_bias or mlp_bias "
            "in the config",
        )


def _missing_cause(
    missing: list[str], found: Mapping[str, tuple[int, ...]], layers: int
) -> tuple[str, str]:
    if missing == ["lm_head.weight"]:
        return (
            "",
            "If the head is the embedding, set tie_word_embeddings to true in the config; else "
            "complete the weights",
        )
    if any(name.startswith(("layers.", "embed_tokens.")) for name in found):
        return (
            " (names lack the prefix model.)",
            "Save the model with its head (LlamaForCausalLM, not LlamaModel)",
        )
    if any(name.endswith((".qweight", ".qzeros", ".weight_packed", ".SCB")) for name in found):
        return " (the weights are quantised)", "Give the float model it was made from"
    indices = [
        int(match.group(1)) for name in found if (match := re.search(r"\.layers\.(\d+)\.", name))
    ]
    have = max(indices, default=-1) + 1
    if have < layers:
        return (
            f" (layers in the file: {have}, in the config: {layers})",
            "The file is incomplete or belongs to a smaller model: check the download",
        )
    return "", "The download is incomplete or the file belongs to another model"


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
