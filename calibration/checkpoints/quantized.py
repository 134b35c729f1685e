"""Finds out in which format a checkpoint is quantized, and reads it as floats that know their codes.

A format is a file of calibration/formats that defines read(config, tensors); its name, with hyphens,
is the quant_method of its configs. It may define CONFIG_FILE, the file that older checkpoints have
beside config.json, and SIGN, the end of a tensor's name that no other checkpoint has.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from calibration.checkpoints.codes import FLOAT_MODEL, Stored, StoredWeights, Tensors
from calibration.checkpoints.foreign import DOWNLOAD_AGAIN
from calibration.out.json_file import read_json
from plugins.errors import InputError
from plugins.text import shown, some

if TYPE_CHECKING:
    from calibration.checkpoints.huggingface import WeightSource

__all__ = ["IN_CONFIG", "accepted_formats", "open_stored", "stored_config"]

_PACKAGE = "calibration.formats"
_FOLDER = Path(__file__).parent.parent / "formats"
IN_CONFIG = ("quantization_config", "compression_config")  # fields of config.json
_SHOWN = 3  # layers in a message


class _Reader(Protocol):
    """What the file of a format that is read defines at its top level."""

    def read(self, config: Mapping[str, Any], tensors: Tensors) -> Stored:
        """The layers with codes of a checkpoint, by its quantization config ({} without one)."""


@cache
def _readers() -> Mapping[str, _Reader]:
    names = sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")
    modules = {name: importlib.import_module(f"{_PACKAGE}.{name}") for name in names}
    return {
        name.replace("_", "-"): cast(_Reader, module)
        for name, module in modules.items()
        if hasattr(module, "read")
    }


def accepted_formats() -> str:
    """Every format that is read, for messages."""
    return f"{', '.join(_readers())} or a .gguf file"


def stored_config(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a folder says of its quantization, with quant_method; None where it says nothing.

    Args:
        raw: its config.json.

    Raises:
        InputError: it is no object, or of a format that is not read.
    """
    for key in IN_CONFIG:
        found = raw.get(key)
        if found:
            return _named(f"{folder / 'config.json'}, {key}", found)
    for name, reader in _readers().items():
        file = getattr(reader, "CONFIG_FILE", "")
        if file and (folder / file).exists():
            found = read_json(folder / file, DOWNLOAD_AGAIN)
            return _named(str(folder / file), {"quant_method": name} | found)
    return None


def _named(where: str, found: Any) -> dict[str, Any]:
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if not isinstance(method, str) or method not in _readers():
        got = f"quant_method {shown(method)}" if isinstance(method, str) else "no quant_method"
        raise InputError(
            where,
            f"got an already quantized checkpoint ({got}), expected float32, float16 or bfloat16 "
            f"weights, or those of {accepted_formats()}",
            FLOAT_MODEL,
        )
    return dict(found)


def open_stored(
    folder: Path, weights: WeightSource, config: Mapping[str, Any] | None
) -> WeightSource:
    """The weights of a folder as floats, with the codes that they are made of where it has some.

    Args:
        config: from stored_config.

    Raises:
        InputError: the format's settings or tensors do not fit together, or there are no codes.
    """
    names = weights.shapes()
    if config is None:
        signs = {
            sign: name
            for name, reader in _readers().items()
            if (sign := getattr(reader, "SIGN", "")) and any(name.endswith(sign) for name in names)
        }
        if not signs:
            return weights
        config = {"quant_method": next(iter(signs.values()))}
    format = str(config["quant_method"])
    stored = _readers()[format].read(config, Tensors(weights, str(folder)))
    if not stored.linears:
        raise InputError(
            str(folder),
            f"got a config of {format} and tensors such as {some(list(names), _SHOWN)}, expected "
            "layers with codes",
            "The config and the weights do not belong together: take the quantization config away, "
            "or give the weights that it is for",
        )
    return StoredWeights(weights, format, config, stored)
