"""Reads what a checkpoint says about generating text, in generation_config.json beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from calibration.checkpoints.foreign import without_negatives
from calibration.out.description import SamplingDefaults
from calibration.out.json_file import TokenId, checked, read_json
from plugins.errors import InputError

__all__ = ["Generation", "read_generation"]

_FILE = "generation_config.json"
_FIX = "Correct the field, or take the file away"
_TOP_K = 50  # transformers' own where a text is drawn and the file gives none
# What a draw alone depends on.
_OF_A_DRAW = ("temperature", "top_k", "top_p")
# Other fields by which transformers chooses tokens, and their values that change nothing, as does an
# empty list. How long a text may become is the caller's to say.
_NOT_FOLLOWED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


@dataclass(frozen=True)
class Generation:
    """How a model's makers want its text to be made.

    Attributes:
        end_tokens: each of them ends a text.
        sampling: how tokens are chosen; None where the file does not say.
        not_followed: what else the file asks for, such as "min_p 0.05".
    """

    end_tokens: tuple[int, ...] = ()
    sampling: SamplingDefaults | None = None
    not_followed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _EndTokens:
    eos_token_id: TokenId | list[TokenId] = field(default_factory=list)


def read_generation(folder: Path) -> Generation:
    """What generation_config.json of a folder says, if there is one.

    What is not given is what transformers' generate takes then: the best token, or, with do_sample,
    a draw among the 50 best at temperature 1. A value of a draw that none can be made with is left
    out where nothing is drawn.

    Raises:
        InputError: the file is damaged, or holds a value that no text can be made with.
    """
    path = folder / _FILE
    if not path.exists():
        return Generation()
    found = read_json(path, _FIX)
    given = _usable({name: value for name, value in found.items() if value is not None})
    drawn = {"top_k": _TOP_K} if given.get("do_sample") is True else {}
    sampling = checked(drawn | given, SamplingDefaults, str(path), _FIX)
    if sampling.do_sample and not sampling.temperature:
        raise InputError(
            f"{path}, temperature", "got 0, expected more than 0 where do_sample is true", _FIX
        )
    eos = checked(given, _EndTokens, str(path), _FIX).eos_token_id
    return Generation(
        end_tokens=tuple(eos) if isinstance(eos, list) else (eos,),
        sampling=sampling if given.keys() & {one.name for one in fields(sampling)} else None,
        not_followed=tuple(
            f"{name} {json.dumps(given[name])}"
            for name, neutral in _NOT_FOLLOWED.items()
            if given.get(name) not in (None, neutral, [], {})
        ),
    )


def _usable(given: dict[str, Any]) -> dict[str, Any]:
    """The fields with what is harmless put right: a negative number that stands for none, 50.0 for
    50, and what a draw would need where there is none.
    """
    found = dict(given)
    if (
        "eos_token_id" in found
        and (ends := without_negatives(found.pop("eos_token_id"))) is not None
    ):
        found["eos_token_id"] = ends
    top_k = found.get("top_k")
    if isinstance(top_k, float) and top_k.is_integer():
        found["top_k"] = int(top_k)
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if not found.get("do_sample"):
        for name in _OF_A_DRAW:
            if name in found and not _fits({name: found[name]}):
                del found[name]
    return found


def _fits(fields: Mapping[str, Any]) -> bool:
    try:
        checked(fields, SamplingDefaults, "")
    except InputError:
        return False
    return True
