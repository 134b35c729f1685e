"""Looks whether a decoder computed numbers, and says where they ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from calibration.quant.scheme import LARGEST_FLOAT16
from plugins.errors import CheckError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["WIDER", "check_finite"]

WIDER = "Export with --dtype bfloat16 or float32, which hold larger numbers"


def check_finite(outputs: Mapping[str, np.ndarray], dtype: str) -> None:
    """Look at the logits of a call.

    Args:
        outputs: of the call by their ONNX names, in the order in which they are computed but for
            the logits.
        dtype: of the model's floats.

    Raises:
        CheckError: NaN or Inf is among the logits; names the first output that has some.
    """
    import numpy as np

    if np.isfinite(outputs["logits"]).all():
        return
    inner = (name for name in outputs if name != "logits")
    first = next((name for name in inner if not np.isfinite(outputs[name]).all()), "logits")
    if dtype == "float16":
        raise CheckError(
            first,
            f"got NaN or Inf, expected numbers of at most {LARGEST_FLOAT16:g}: float16 overflows",
            WIDER,
        )
    raise CheckError(
        first,
        "got NaN or Inf, expected finite numbers",
        "The model is broken: look at the report's first bad layer",
    )
