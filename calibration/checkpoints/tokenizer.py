"""Opens tokenizers, and never runs code that came with one or with a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

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


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The transformers tokenizer of a folder, from its files alone.

    Args:
        options: of AutoTokenizer.from_pretrained.

    Raises:
        InputError: it brings code of its own. Exception: whatever transformers does not like.
    """
    refuse_code(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, **options
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
