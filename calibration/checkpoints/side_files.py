"""Reads what a checkpoint says about generating text, in generation_config.json beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from calibration.out.description import SamplingDefaults
from calibration.out.json_file import TokenId, checked, read_json
from plugins.errors import InputError

__all__ = ["Generation", "read_generation"]

_FILE = "generation_config.json"
_FIX = "Correct the field, or take the file away"
_TOP_K = 50  # transformers' own where a text is drawn and the file gives none
# Fields that change the text too, by which nobody here chooses tokens. 0 and 1 change nothing.
_NOT_FOLLOWED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "dola_layers",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "top_h",
    "typical_p",
)


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
    a draw among the 50 best at temperature 1.

    Raises:
        InputError: the file is damaged, or holds a value that no text can be made with.
    """
    path = folder / _FILE
    if not path.exists():
        return Generation()
    found = read_json(path, _FIX)
    given = {name: value for name, value in found.items() if value is not None}
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
            for name in _NOT_FOLLOWED
            if given.get(name) not in (None, 0, 1, [], {})
        ),
    )
