"""Round to nearest: the plain method. No data, no search; every row (or group of a row) by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from plugins import op_spec
from plugins.core.op_spec import QuantArrays

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["quantize"]

_CHUNK = 1 << 22  # weights converted to fp32 together


def quantize(weight: np.ndarray, bias: np.ndarray | None, scheme: QuantScheme) -> QuantArrays:
    """Codes of one linear, by chunks of rows so that fp32 copies stay small.

    Args:
        weight: [N, K], any float type, finite.
        bias: [N] or None.
        scheme: op, bits and group size.
    """
    op, rows = op_spec(scheme.op), max(1, _CHUNK // weight.shape[1])
    parts = [
        op.round_plain(np.asarray(weight[start : start + rows], np.float32), scheme.gemm)
        for start in range(0, len(weight), rows)
    ]
    return replace(
        QuantArrays.stacked(parts), bias=None if bias is None else np.asarray(bias, np.float32)
    )
