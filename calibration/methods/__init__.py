"""The quantisation methods, one file or folder each; its name is the key.

A method that looks at weights alone defines quantize(); one that looks at data defines METHOD, see
calibration/blocks/driver.py.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.quant.scheme import QuantScheme
    from plugins.core.op_spec import QuantArrays

__all__ = ["PLAIN_METHOD", "Method", "is_block_method", "method", "method_names"]

PLAIN_METHOD = "rtn"  # keeps the weights what they are, for every op


class Method(Protocol):
    """What the file of a method without data defines at its top level."""

    def quantize(
        self, weight: np.ndarray, bias: np.ndarray | None, scheme: QuantScheme
    ) -> QuantArrays:
        """Integer codes of one linear layer: weight [N, K] of any float type, bias [N] or None."""


@cache
def method_names() -> tuple[str, ...]:
    """Names of every method, sorted."""
    found = [
        path
        for path in Path(__file__).parent.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    return tuple(sorted(path.stem for path in found if path.stem != "__init__"))


def method(name: str) -> Any:
    """The module of the method called `name`.

    Raises:
        InputError: no such method.
    """
    if name not in method_names():
        raise InputError(
            f"method {name!r}",
            f"unknown, expected one of {', '.join(method_names())}",
            "Check the spelling",
        )
    return importlib.import_module(f"{__name__}.{name}")


def is_block_method(name: str) -> bool:
    """Whether the method looks at data, block by block."""
    return hasattr(method(name), "METHOD")
