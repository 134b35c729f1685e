"""Opens tokenizers, and never runs code that came with one or with a model."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from calibration.checkpoints.foreign import DOWNLOAD_AGAIN, quiet_transformers, reason
from calibration.families import own_code
from calibration.out.json_file import read_json
from plugins.errors import InputError
from plugins.text import shown

__all__ = ["check_named", "check_templates", "load_tokenizer", "refuse_code"]

# Where transformers looks for auto_map, which names classes in Python files beside the model.
_MAY_NAME_CODE = ("config.json", "tokenizer_config.json")
_TEMPLATE = re.compile(r"\w[\w.-]{0,99}")  # each is saved as a file of that name
_PROBE = "The river, 1 and 2"
_READ = (".py", ".json", ".jinja", ".model", ".txt")


def refuse_code(folder: Path) -> None:
    """Look whether a model or tokenizer brings code of its own, which nothing here runs.

    Raises:
        InputError: one does, by auto_map, that is not known to be transformers' own; or a file that
            may name it is no JSON.
    """
    for name in _MAY_NAME_CODE:
        path = folder / name
        named = read_json(path, DOWNLOAD_AGAIN).get("auto_map") if path.exists() else None
        if named and not _is_known(named, folder):
            raise InputError(
                f"{path}, auto_map",
                "got classes in Python code of the model's own, expected those of transformers",
                "Nothing here runs such code. If transformers' own classes compute the same, take "
                "auto_map out of the file; download a model of the hub into a folder first",
            )


def _is_known(auto_map: Any, folder: Path) -> bool:
    """Whether all that auto_map names is what the model's own family says transformers' classes were
    made from.
    """
    path = folder / _MAY_NAME_CODE[0]
    architectures = read_json(path, DOWNLOAD_AGAIN).get("architectures") if path.exists() else None
    if not (isinstance(auto_map, dict) and isinstance(architectures, list) and architectures):
        return False
    known = own_code(str(architectures[0]))
    return all(isinstance(name, str) and name in known for name in auto_map.values())


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
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            # Values of the wrong kind in its files show when it is used.
            tokenizer.decode([int(token) for token in tokenizer(_PROBE)["input_ids"]])
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise _model_alone(folder) or InputError(
            str(folder), f"got no readable tokenizer ({reason(error)})", fix
        ) from None
    if isinstance(tokenizer.chat_template, dict):
        check_templates(tokenizer.chat_template, f"{folder}, chat templates", fix)
    return tokenizer


def check_templates(names: Iterable[object], where: str, fix: str) -> None:
    """Look whether chat templates have names that files can have.

    Raises:
        InputError: one does not.
    """
    for name in names:
        if not isinstance(name, str) or not _TEMPLATE.fullmatch(name):
            raise InputError(
                where,
                f"got {shown(name)!r}, expected the name of a template, such as tool_use",
                fix,
            )


def _model_alone(folder: Path) -> InputError | None:
    """What is missing where tokenizer.model has to do without tokenizer.json."""
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").exists():
        return None
    beside = "put the model's tokenizer.json beside it"
    with path.open("rb") as file:
        if not file.read(1).startswith(b"\n"):  # sentencepiece's first field; tiktoken has text
            return InputError(
                str(path),
                "got a tokenizer of another kind than sentencepiece, expected a tokenizer.json",
                f"Convert it, or {beside}",
            )
    if importlib.util.find_spec("sentencepiece") is not None:
        return None
    return InputError(
        str(path),
        "got a sentencepiece tokenizer and no tokenizer.json, expected the package sentencepiece "
        "to read it",
        f"Run `pip install sentencepiece`, or {beside}",
    )


def check_named(folder: Path, known: Collection[str], fix: str) -> list[str]:
    """Look whether a folder holds nothing that transformers may read or run but what its list
    names. A symbolic link that nobody named may lead to anything.

    Args:
        known: names of its files, relative to it.
        fix: what to do about it, for the message.

    Returns:
        Names of the files that transformers may read.

    Raises:
        InputError: it does.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name, link = str(path.relative_to(folder)), path.is_symlink()
        read = not path.is_dir() and (path.suffix in _READ or "token" in path.name)
        if name not in known and (read or link):
            raise InputError(
                str(path),
                f"got a {'symbolic link' if link else 'file'} without a record, expected one of "
                "this stage's",
                fix,
            )
        if read:
            found.append(name)
    return found
