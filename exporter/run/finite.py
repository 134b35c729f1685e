"""Looks whether a decoder computed numbers, and says where they ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from calibration.quant.scheme import LARGEST_FLOAT16
from exporter.graph.names import is_layer_output, layer_of
from plugins.errors import CheckError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["WIDER", "check_finite"]

WIDER = "--dtype bfloat16 or float32, which hold larger numbers"


def check_finite(outputs: Mapping[str, np.ndarray], dtype: str) -> None:
    """Look at the logits of a call, and at the residual stream behind each layer as far as it is
    there.

    Args:
        outputs: of the call by their ONNX names.
        dtype: of the model's floats.

    Raises:
        CheckError: NaN or Inf is among them, or a layer's output is as large as float16 can be,
            which kernels write for all that is larger; names the first output, in the order of the
            layers, in which there is some.
    """
    seen = (name for name in outputs if name == "logits" or is_layer_output(name))
    if not any(_got(name, outputs[name], dtype) for name in seen):
        return
    got = {name: found for name in outputs if (found := _got(name, outputs[name], dtype))}
    first = min(got, key=_depth)
    if dtype != "float16":
        raise CheckError(
            first,
            f"got {got[first]}, expected finite numbers",
            "The model is broken: look at the report's first bad layer",
        )
    where = f" at layer {layer_of(first)}" if is_layer_output(first) else ""
    raise CheckError(
        first,
        f"got {got[first]}, expected numbers below {LARGEST_FLOAT16:g}: float16 overflows{where}",
        f"Export with {WIDER}",
    )


def _got(name: str, array: np.ndarray, dtype: str) -> str:
    """What is wrong with an output; "" for nothing."""
    import numpy as np

    if not np.isfinite(array).all():
        return "NaN or Inf"
    largest = dtype == "float16" and is_layer_output(name) and np.abs(array).max()
    return f"{largest:g}" if largest >= LARGEST_FLOAT16 else ""


def _depth(name: str) -> tuple[float, bool]:
    """Where an output is computed: a layer's cache is older than what it gives on."""
    layer = layer_of(name)
    return (math.inf if layer is None else layer), is_layer_output(name)
