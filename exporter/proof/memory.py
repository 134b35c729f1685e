"""Refuses a validation that would not fit into the free memory, before hours of other work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from plugins import op_spec
from plugins.cores import free_memory
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.quant.scheme import QuantScheme

__all__ = ["check_memory"]

_REFERENCE = 4  # bytes per weight: the torch references hold fp32, one of them at a time


def check_memory(weights: int, schemes: Mapping[QuantScheme, int]) -> None:
    """Compare what validation needs at its peak with the free memory, where the system tells it
    (Linux).

    Args:
        weights: of the whole model, such as Checkpoint.parameter_count.
        schemes: how many of them are (to be) quantised how; the others are counted like their
            average.

    Raises:
        InputError: it does not fit.
    """
    free = free_memory()
    if free is None:
        return
    unpacked = sum(_bytes_per_weight(scheme) * count for scheme, count in schemes.items())
    needed = unpacked * weights // sum(schemes.values())
    if needed > free:
        raise InputError(
            "validation",
            f"got {free / 1e9:.2f} GB of free memory, expected {needed / 1e9:.2f} GB to unpack "
            f"{weights / 1e6:.0f} M weights",
            "Use --until engine here, and validate on a machine with more memory",
        )


def _bytes_per_weight(scheme: QuantScheme) -> int:
    return max(_REFERENCE, op_spec(scheme.op).unpacked_bytes(scheme.gemm))
