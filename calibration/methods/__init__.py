"""The quantisation methods, one file each; the file name is the key; each defines quantize() of the protocol below."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from plugins.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.scheme import QuantScheme
    from plugins.core.op_spec import QuantArrays

__all__ = ["Method", "method", "method_names"]


class Method(Protocol):
    """What a method's file defines at its top level."""

    def quantize(self, weight: np.ndarray, bias: np.ndarray | None, scheme: QuantScheme) -> QuantArrays:
        """Integer codes of one linear layer: weight [N, K] of any float type, bias [N] or None."""


@cache
def method_names() -> tuple[str, ...]:
    """Names of every method, sorted."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"))


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        InputError: no such method.
    """
    if name not in method_names():
        raise InputError(f"method {name!r}", f"unknown, expected one of {', '.join(method_names())}", "Check the spelling")
    module: Method = importlib.import_module(f"{__name__}.{name}")  # type: ignore[assignment]
    return module
