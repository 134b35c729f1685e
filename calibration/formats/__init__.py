"""The formats that quantized models are also written in, or read from, one file each; the file name,
with hyphens, is the key.

What is written is here: check(scheme, checkpoint) and write(quant, folder). What is read,
read(config, tensors), calibration/checkpoints/quantized.py asks for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.quant.folder import QuantModel
    from calibration.quant.scheme import QuantScheme

__all__ = ["OURS", "Format", "check", "check_head", "check_orders", "format_names", "write"]

_WRITES = "\ndef write("
OURS = "anybit"  # the quant folder itself: nothing more to write


class Format(Protocol):
    """What the file of a format that is written defines at its top level."""

    def check(self, scheme: QuantScheme, checkpoint: Checkpoint | None = None) -> None:
        """Raise InputError if the format cannot say this scheme or, where it is given, this model."""

    def write(self, quant: QuantModel, folder: Path) -> None:
        """Write the model into an empty folder, by streaming; raise InputError for a layer that the
        format cannot say.
        """


@cache
def format_names() -> tuple[str, ...]:
    """Our own format, then every other that is written, sorted."""
    others = (
        path.stem.replace("_", "-")
        for path in Path(__file__).parent.glob("*.py")
        # the text, since importing what reads and writes would slow every --help
        if path.stem != "__init__" and _WRITES in path.read_text(encoding="utf-8")
    )
    return OURS, *sorted(others)


def _format(name: str) -> Format:
    if name not in format_names():
        raise InputError(
            f"format {name!r}",
            f"unknown, expected one of {', '.join(format_names())}",
            "Check the spelling",
        )
    module: Format = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")  # type: ignore[assignment]
    return module


def check(name: str, scheme: QuantScheme, checkpoint: Checkpoint | None = None) -> None:
    """Before any work: whether the format can say this scheme and, where it is given, this model.

    Raises:
        InputError: it cannot, or there is no such format.
    """
    if name != OURS:
        _format(name).check(scheme, checkpoint)


def check_head(name: str, scheme: QuantScheme) -> None:
    """Before any work: whether the format can say a quantized head.

    Raises:
        InputError: it cannot, as none but ours.
    """
    if name != OURS:
        raise InputError(
            "--head-bits",
            f"got {scheme.wbits} with --format {name}, expected 16: other tools read the head as "
            f"floats",
            f"Add --head-bits 16, or leave out --format {name}",
        )


def check_orders(name: str, nodes: Iterable[str]) -> None:
    """Before any work: whether the format can say GEMM nodes whose input channels have an order of
    their own.

    Raises:
        InputError: there are such nodes, which none but ours can.
    """
    first = next(iter(nodes), "")
    if name != OURS and first:
        raise InputError(
            f"--format {name}",
            f"got {first} with its input channels in an order of their own, expected them in order",
            "Leave out --format",
        )


def write(name: str, quant: QuantModel) -> None:
    """Write a finished quant folder in another format too, into its sub-folder of that name;
    "anybit" writes nothing.

    Raises:
        InputError: a layer or a head that the format cannot say, the folder is there already, or
            there is no such format.
    """
    if name != OURS:
        check_orders(name, quant.decoder.orders)
        if quant.head is not None:
            check_head(name, quant.head)
        writer, folder = _format(name), quant.path / name
        try:
            folder.mkdir()
        except FileExistsError:
            raise InputError(
                str(folder),
                "got a folder that is there already, expected none",
                "Delete it to write it again",
            ) from None
        writer.write(quant, folder)
