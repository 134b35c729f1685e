"""Opens tokenizers, and never runs code that came with one or with a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

from calibration.checkpoints.foreign import reason
from calibration.out.json_file import read_json
from plugins.errors import InputError

__all__ = ["check_named", "load_tokenizer", "refuse_code"]

# Where transformers looks for auto_map, which names classes in Python files beside the model.
_MAY_NAME_CODE = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_AGAIN = "It is truncated or damaged: download it again"
_PROBE = "The river, 1 and 2"
_READ = (".py", ".json", ".jinja", ".model", ".txt")


def refuse_code(folder: Path) -> None:
    """Look whether a model or tokenizer brings code of its own, which nothing here runs.

    Raises:
        InputError: one does, by auto_map; or a file that may name it is no JSON.
    """
    for name in _MAY_NAME_CODE:
        path = folder / name
        if path.exists() and read_json(path, _AGAIN).get("auto_map"):
            raise InputError(
                f"{path}, auto_map",
                "got classes in Python code of the model's own, expected those of transformers",
                "Nothing here runs such code. If transformers' own classes compute the same, take "
                "auto_map out of the file",
            )


def load_tokenizer(folder: Path, fix: str) -> Any:
    """The transformers tokenizer of a folder, from its files alone.

    Args:
        folder: of a model or a stage.
        fix: what to do about one that cannot be read.

    Raises:
        InputError: there is none, it cannot be read, does not work, or brings code of its own.
    """
    refuse_code(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # Values of the wrong kind in its files show when it is used.
        tokenizer.decode([int(token) for token in tokenizer(_PROBE)["input_ids"]])
    except Exception as error:  # transformers and tokenizers raise many kinds
        if _needs_sentencepiece(folder):
            raise InputError(
                str(folder / "tokenizer.model"),
                "got a sentencepiece tokenizer and no tokenizer.json, expected the package "
                "sentencepiece to read it",
                "Run `pip install sentencepiece`, or put the model's tokenizer.json beside it",
            ) from None
        raise InputError(str(folder), f"got no readable tokenizer ({reason(error)})", fix) from None
    return tokenizer


def _needs_sentencepiece(folder: Path) -> bool:
    path = folder / "tokenizer.model"
    return (
        path.is_file()
        and not (folder / "tokenizer.json").exists()
        and importlib.util.find_spec("sentencepiece") is None
    )


def check_named(folder: Path, known: Collection[str], fix: str) -> None:
    """Look whether a folder holds nothing that transformers may read or run but what its list
    names.

    Args:
        known: names of its files, relative to it.
        fix: what to do about it, for the message.

    Raises:
        InputError: it does.
    """
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        read = path.suffix in _READ or "token" in path.name
        if read and name not in known and not path.is_dir():
            raise InputError(
                str(path), "got a file without a record, expected one of this stage's", fix
            )
