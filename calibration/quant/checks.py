"""Checks the settings against a model's layers, before any work."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

from calibration import formats
from calibration.quant.bits import SchemeMap, as_map
from calibration.quant.scheme import QuantScheme
from plugins import op_spec
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint

__all__ = ["check_scheme"]

_MIN_GROUP = 16


def check_scheme(
    checkpoint: Checkpoint, schemes: QuantScheme | SchemeMap, format_name: str = formats.OURS
) -> None:
    """Settings, and another format to write, against this model's layers, before any work.

    Raises:
        InputError: bits, group size, op or format do not fit, or as SchemeMap.nodes.
    """
    schemes = as_map(schemes)
    if schemes.head is not None and schemes.head_limit is None:
        formats.check_head(format_name, schemes.head)
    for scheme, linears in schemes.linears(schemes.decoder(checkpoint.decoder)).items():
        formats.check(format_name, scheme, checkpoint)
        rule = "" if scheme == schemes.base else f"{scheme.label} for {next(iter(linears))}"
        _check_one(scheme, sorted(set(linears.values())), rule)


def _check_one(scheme: QuantScheme, shapes: list[tuple[int, int]], rule: str) -> None:
    op = op_spec(scheme.op)
    objection = op.objection(scheme.gemm)
    if objection is not None:
        raise InputError(f"{scheme.op}, {rule}" if rule else scheme.op, *objection)
    _check_group(scheme, [in_features for _, in_features in shapes], rule)
    for out_features, in_features in shapes:
        where = f"a linear layer of {out_features} x {in_features}"
        op.check(scheme.attributes(out_features, in_features, False), where)


def _check_group(scheme: QuantScheme, widths: list[int], rule: str) -> None:
    """The group size of the command line, or of a rule of a bits file, which is then named."""
    size, where, option = (
        scheme.group_size,
        rule or "--group-size",
        "-g" if rule else "--group-size ",
    )
    common, op = reduce(math.gcd, widths), op_spec(scheme.op)
    fitting = [
        n
        for n in range(_MIN_GROUP, common + 1)
        if common % n == 0 and op.takes(replace(scheme.gemm, group_size=n))
    ]
    if size == 0 or (size in fitting):
        return
    choices = (
        f"Use {option}0 (one scale per output "
        f"channel){' or ' + ', '.join(map(str, fitting)) if fitting else ''}"
    )
    if size < _MIN_GROUP:
        raise InputError(where, f"got {size}, expected 0 or at least {_MIN_GROUP}", choices)
    bad = ", ".join(str(width) for width in sorted(set(widths)) if width % size)
    these = "the linear layers it is for" if rule else "this model's linear layers"
    raise InputError(
        where, f"got {size}, which does not divide the in_features {bad} of {these}", choices
    )
